"""Programs: `python -m tools.NAME`."""
import util.openmp  # noqa: F401  (before torch)
