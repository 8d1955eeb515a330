"""Measurements as lines of text and as a picture."""
from pathlib import Path
from typing import Any, Dict, List

from tools.output import writing
from util.plot_utils import pyplot


def lines_of(name: str, part: Dict[str, Any]) -> List[str]:
    """What is printed of a part."""
    ours = part["ours"]
    shape = f", {part['images']} of {part['size'][0]}x{part['size'][1]}" if "size" in part else ""
    low, high = ours["quartiles_ms"]
    lines = [f"{name}: {part['title']}{shape}",
             f"  {ours['median_ms']:.1f} ms ({low:.1f} … {high:.1f}, {ours['repeats']} times), "
             f"{ours['images_per_s']:.2f} images/s"]
    for other, figures in part.get("against", {}).items():
        if "note" in figures:
            lines.append(f"  against {other}: {figures['note']}")
            continue
        low, high = figures["quartiles_ms"]
        lines.append(f"  against {other}: {figures['median_ms']:.1f} ms ({low:.1f} … {high:.1f}): "
                     f"ours is {figures['ratio']:.2f} times as fast")
        differences = [f"{key.rsplit('_of_', 1)[1]} differ by at most {value:.1e}"
                       for key, value in figures.items() if key.startswith("largest_difference_of_")]
        if differences:
            lines.append(f"    with the same weights: loss {figures['loss']:.6f}, ours {part['loss']:.6f}; "
                         + ", ".join(differences))
        if figures.get("unknown_flags"):
            lines.append(f"    it doesn't know {' '.join(figures['unknown_flags'])}")
    if "components_ms" in part:
        lines.append("  " + ", ".join(f"{key} {value:.1f}" for key, value in part["components_ms"].items()) + " ms")
    if "share_of_peak" in part:
        lines.append(f"  {part['gflops_per_s']:.0f} GFLOP/s, {100 * part['share_of_peak']:.0f} % of the matrix product's; "
                     f"memory {part['peak_memory_mb']:.0f} MB")
        lines.append(f"  a step: {part['host_reads_per_step']} reads by the host, {part['operators_per_step']} operators"
                     + (f", {part['host_waits_per_step']} waits, {part['kernels_per_step']} kernels"
                        if "host_waits_per_step" in part else ""))
    return lines


def plot(report: Dict[str, Any], output: str) -> None:
    """Draw the median of each part with its quartiles, ours and the others', each in its own panel."""
    plt = pyplot()
    plt.switch_backend("agg")  # works where there is no screen
    parts = {name: part for name, part in report["parts"].items() if "ours" in part}
    figure, axes = plt.subplots(len(parts), 1, figsize=(8, 0.6 + 0.9 * len(parts)), squeeze=False, layout="constrained")
    for axis, (name, part) in zip(axes[:, 0], parts.items()):
        rows = {"this checkout": part["ours"], **{other: figures for other, figures in part["against"].items()
                                                  if "median_ms" in figures}}
        medians = [row["median_ms"] for row in rows.values()]
        errors = [[row["median_ms"] - row["quartiles_ms"][0] for row in rows.values()],
                  [row["quartiles_ms"][1] - row["median_ms"] for row in rows.values()]]
        axis.barh(list(rows), medians, xerr=errors, color=[f"C{i}" for i in range(len(rows))])
        axis.invert_yaxis()
        axis.set_title(f"{part['title']}, ms", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    with writing("--plot", output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    plt.close(figure)
