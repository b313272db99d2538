"""Quality against cost: plots, the points on their fronts, and how time was measured."""

from __future__ import annotations

from collections.abc import Sequence

from nmflow.experiments.report import cost_plots as plots
from nmflow.experiments.report.blocks import (
    Block,
    Figure,
    Section,
    Table,
    Text,
    number,
    quantity,
    threads,
)
from nmflow.experiments.report.compare import LESS_IS_BETTER
from nmflow.experiments.report.overview_words import some
from nmflow.experiments.report.pareto import AXES, Point, front, points
from nmflow.experiments.report.settings import NONE, Group
from nmflow.experiments.report.times import BEST, DENSE, PACKED, Times


def costs(groups: Sequence[Group], times: Times) -> list[Section]:
    """Quality against training FLOPs, inference FLOPs, bytes and measured time."""
    out = []
    for place, group in enumerate(groups):
        found = points(group, times)
        blocks: list[Block] = []
        known = {axis: [p.costs[axis] for p in found if axis in p.costs] for axis in AXES}
        axes = [axis for axis, costs in known.items() if len(set(costs)) > 1]
        same = [AXES[axis] for axis, costs in known.items() if len(costs) > len(set(costs)) == 1]
        if axes:
            names = {a: _timed_axis(times) if a == "time_us" else AXES[a] for a in axes}
            said = ", ".join(AXES[axis] for axis in axes)
            alt = f"Test {group.headline} against {said}, a marker a recipe"
            drawn = plots.pareto(group, found, names)
            blocks.append(Figure(f"costs-{place}", drawn, alt, _caption(group, axes)))
            blocks.append(_members(group, found, axes))
        if same and len(found) > 1:
            text = f"All cost the same in {' and in '.join(same)}, so there is no plot of that."
            blocks.append(Text(text))
        blocks += _timing(group, times)
        more = f": {group.title}" if len(groups) > 1 else ""
        out.append(Section("Quality against cost" + more, blocks))
    return out


def _caption(group: Group, axes: Sequence[str]) -> str:
    told = {
        "training_flops": "Training FLOPs are of the whole run, counted by phase.",
        "inference_flops": "Inference FLOPs are of one example, for an N:M implementation.",
        "bytes": "Bytes are of the values and of the index that says where they are.",
        "time_us": "Time is the median of a forward pass; below, how it was measured.",
    }
    text = " ".join(told[axis] for axis in axes)
    usual = [f"{key.rpartition('.')[2]} {value}" for key, value in group.usual.items()]
    if usual and len(group.settings) > 1:
        text += f" Where nothing else is said: {', '.join(usual)}."
    return (
        f"{text} Means over seeds with 95 % intervals; the cost axis is logarithmic. A name stands "
        "at the best point of its setting, if there is room. The step line is the front: no other "
        "mean is as good at as low a cost. It compares means alone: a point whose interval reaches "
        "the line may lie on it."
    )


def _timed_axis(times: Times) -> str:
    batch, count, _ = times.condition or (1, 1, "")
    return f"median time of a forward pass, batch {batch}, {threads(count)}"


def _members(group: Group, found: Sequence[Point], axes: Sequence[str]) -> Table:
    less = group.headline in LESS_IS_BETTER
    fronts = {axis: {id(p) for p in front(found, axis, less)} for axis in axes}
    rows = []
    for p in found:
        on = [axis for axis in axes if id(p) in fronts[axis]]
        if not on:
            continue
        ends = f" [{number(p.low)}, {number(p.high)}]" if p.low is not None else ""
        cells = [
            (_cost(axis, p) + (" ◂" if axis in on else "")) if axis in p.costs else NONE
            for axis in axes
        ]
        rows.append([p.label or NONE, p.cell.recipe.title, number(p.quality.mean) + ends, *cells])
    head = ["setting", "recipe", f"test {group.headline}, mean [95\u00a0%]"]
    head += [AXES[axis] for axis in axes]
    text = (
        "The members of the fronts by their means; ◂ marks the costs in whose front a row stands. "
        "All points are in pareto.csv."
    )
    return Table(text, head, rows, left=2)


def _cost(axis: str, p: Point) -> str:
    value = p.costs[axis]
    return plots.duration(value) if axis == "time_us" else quantity(value)


def _timing(group: Group, times: Times) -> list[Block]:
    timed = [(cell, times.of(cell)) for cell in group.cells()]
    entry = next((t.entry for _, t in timed if t), None)
    out: list[Block] = []
    if entry is None:
        text = (
            "Time was not measured: 'nmflow report RUNS --time' measures each distinct network "
            "once, on this machine, and draws quality against it."
        )
        if times.others:
            text = (
                "No network of this plot was timed with this batch and these threads; there are "
                "times under other conditions."
            )
        return [Text(text), *_problems(times)]
    rows, seen, absent = [], set(), []
    for cell, found in timed:
        label = group.label(cell.setting, cell.dense, short=True)
        name = ", ".join(filter(None, ["dense" if cell.dense else "sparse", label]))
        if found is None:
            absent.append(name)
            continue
        key = found.entry["key"]
        if key in seen:
            continue
        seen.add(key)
        row = [name]
        for way in (DENSE, BEST, PACKED):
            t = found.entry["ways"].get(way)
            low_high = f" [{plots.duration(t['q10'])}, {plots.duration(t['q90'])}]" if t else ""
            row.append(plots.duration(t["median"]) + low_high if t else NONE)
        row += [found.entry["packed_weights"] or NONE, found.entry["date"][:10]]
        rows.append(row)
    head = ["network", "as it is", "best dense", "compressed", "packed weights", "measured"]
    batch, count, cpu = times.condition or (1, 1, "")
    caption = (
        f"Median and deciles of a forward pass, float32, batch {batch}, {threads(count)}, on "
        f"{cpu}; {entry['versions']}; {entry['clock']}. One saved network stands for all recipes "
        "and seeds of its network and placement, since time depends on neither. The ways of one "
        "network took turns; networks were timed one after another. The plot shows the compressed "
        "network, and of a dense one the faster of its two ways. Where deciles overlap, neither "
        "network is shown to be faster."
    )
    out.append(Table(caption, head, rows))
    idle = [row[0] for row in rows if row[4].startswith("0 of")]
    if idle:
        out.append(
            Text(
                f"No weight was faster packed than dense here in: {some(idle, '; ')}. "
                "Compressed, such a network runs dense kernels."
            )
        )
    if entry["generates"]:
        out.append(
            Text(
                "The task is scored on text that the network generates by beam search; the time is "
                "of one forward pass over a whole example, not of that search."
            )
        )
    if absent:
        names = some(list(dict.fromkeys(absent)), "; ")
        out.append(Text(f"Without a time under this condition, so not in its plot: {names}."))
    return [*out, *_problems(times)]


def _problems(times: Times) -> list[Block]:
    if not times.problems:
        return []
    return [Text("Not timed: " + "; ".join(times.problems).rstrip(".") + ".")]
