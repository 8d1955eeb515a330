"""Measurements as lines of text and as a picture."""
from pathlib import Path
from typing import Any, Dict, List

from tools.benchmark.rounds import OURS
from tools.output import writing
from util.plot_utils import pyplot


def lines_of(name: str, part: Dict[str, Any]) -> List[str]:
    """What is printed of a part."""
    shape = f", {part['images']} of {part['size'][0]}x{part['size'][1]}" if "size" in part else ""
    title = f"{name}: {part['title']}{shape}"
    if "processes" in part:
        return [title] + [f"  {number} x {figures['threads']} threads: {figures['median_ms']:.1f} ms, "
                          f"{figures['images_per_s']:.2f} images/s, efficiency {figures['efficiency']:.2f}"
                          for number, figures in part["processes"].items()]
    if "padding" in part:
        return [title] + [f"  {number} images: {100 * shares['share']:.1f} %, with --group_by_aspect "
                          f"{100 * shares['share_grouped']:.1f} %" for number, shares in part["padding"].items()]
    if "data_wait_share" in part:
        return [title, f"  {part['step_ms']:.1f} ms a step, {part['images_per_s']:.2f} images/s, "
                f"{100 * part['data_wait_share']:.1f} % of it waiting for {part['workers']} loading processes"]
    ours = part["ours"]
    low, high = ours["quartiles_ms"]
    lines = [title,
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
            lines.append(f"    {', '.join(differences)}")
        if "loss" in figures:
            lines.append(f"    loss {figures['loss']:.6f}, ours {part['loss']:.6f}")
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


def growth_lines(name: str, growth: Dict[str, Any]) -> List[str]:
    """What is printed of a growth: a row for each point."""
    rows = []
    for point in growth["points"]:
        figures = ", ".join(f"{key} {value:.1f}" for key, value in point.items() if isinstance(value, float))
        rows.append(f"  {point['value']:>8}: {figures}")
    return [f"growth of {growth['part']} with {name} ({growth['title']})", *rows]


def plot(report: Dict[str, Any], output: str) -> None:
    """Draw the median of each part with its quartiles, ours and the others', in a panel; each growth in a panel, too."""
    plt = pyplot()
    plt.switch_backend("agg")  # works where there is no screen
    parts = [part for part in report["parts"].values() if "ours" in part]
    growths = list(report.get("growth", {}).values())
    heights = [0.5 + 0.4 * (1 + len(part["against"])) for part in parts] + [2.5] * len(growths)
    figure, axes = plt.subplots(len(heights), 1, figsize=(8, sum(heights)), squeeze=False, layout="constrained",
                                gridspec_kw={"height_ratios": heights})
    for axis, part in zip(axes[:, 0], parts):
        _draw_part(axis, part)
    for axis, growth in zip(axes[len(parts):, 0], growths):
        _draw_growth(axis, growth)
    with writing("--plot", output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    plt.close(figure)


def _draw_part(axis: Any, part: Dict[str, Any]) -> None:
    rows = {OURS: part["ours"], **{other: figures for other, figures in part["against"].items() if "median_ms" in figures}}
    medians = [row["median_ms"] for row in rows.values()]
    errors = [[row["median_ms"] - row["quartiles_ms"][0] for row in rows.values()],
              [row["quartiles_ms"][1] - row["median_ms"] for row in rows.values()]]
    axis.barh(list(rows), medians, xerr=errors, color=[f"C{i}" for i in range(len(rows))])
    axis.invert_yaxis()
    axis.set_title(f"{part['title']}, ms", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)


def _draw_growth(axis: Any, growth: Dict[str, Any]) -> None:
    """Time on the left, memory on the right."""
    points = growth["points"]
    values = [point["value"] for point in points]
    times = [key for key in points[0] if key == "median_ms" or key.startswith("start_s")]
    memory = [key for key in points[0] if key.startswith(("peak_memory_mb", "peak_mb", "held_mb"))]
    lines = [axis.plot(values, [point[key] for point in points], "o-", label=key)[0] for key in times]
    drawn = [axis]
    if memory:
        drawn.append(axis.twinx())
        lines += [drawn[1].plot(values, [point[key] for point in points], "s--", color=f"C{i}", label=key)[0]
                  for i, key in enumerate(memory, len(times))]
    for side in drawn:
        side.set_ylim(0, 1.1 * side.get_ylim()[1])
        side.tick_params(labelsize=8)
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel(growth["title"], fontsize=8)
    axis.set_title(growth["part"], fontsize=9, loc="left")
    # On the line of the title, where it covers no point.
    axis.legend(handles=lines, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(lines), frameon=False)
