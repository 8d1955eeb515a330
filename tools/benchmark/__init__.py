"""How fast everything is on this machine: `python -m tools.benchmark`; see docs/speed.md."""
