"""`audit`: does every weight of a network, in memory or on disk, hold its pattern?"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nmflow.errors import FileFormatError, PlanError
from nmflow.inspect.checkpoints import SavedState, open_state
from nmflow.inspect.findings import Audit, AuditRow
from nmflow.inspect.record import read_record
from nmflow.masks import holds
from nmflow.pattern import EVERY, Pattern
from nmflow.select.layer import Layer
from nmflow.select.plan import Names, Patterns, choose
from nmflow.select.states import layers_of_state
from nmflow.select.target import LeftOut, Plan, Target, rows_of
from nmflow.select.weights import layers_of
from nmflow.text_table import shown

_PACKED = "nmflow.json"
"""The header of a folder that `nmflow.save` wrote."""
Layers = list[tuple[Layer, str]]


def audit(
    model_or_path: nn.Module | str | Path,
    pattern: Patterns | Plan | None = None,
    include: Names | None = None,
    exclude: Names = (),
) -> Audit:
    """Check that a network holds its patterns: at most N of every M weights are not zero.

    Without a pattern it judges the weights that the run pruned, by the record that `nmflow train`
    and `write_record` leave beside them and that packed folders hold. Without a record it finds
    the sparsest pattern that each weight holds, and no weight is wrong.

    Args:
        model_or_path: a model, also a packed or a frozen one; or a `.safetensors`, `.pt`, `.pth`,
            `.bin` or `.ckpt` file, a folder of Hugging Face's (sharded or not), or one that
            `nmflow.save` wrote.
        pattern: a pattern, or a mapping from presets or globs to patterns, as in `plan`; or a
            `Plan`, such as `flow.plan`, to judge what it lists; or None.
        include: as in `plan`. None takes the weights in the record, or `"all"` without a record, or
            every weight without a pattern.
        exclude: as in `plan`.

    Returns:
        An `Audit`. Weights whose axis M does not divide are left out, with the reason. A bare file
        has only names and shapes, which tell axes and roles: HF's `Conv1D` by the names of GPT-2,
        embeddings and heads by their usual names. Name others in `exclude`. Sharded parameters
        (FSDP2) are gathered, so every rank has to call it.

    Raises:
        PlanError: a preset or a glob that takes nothing; a `Plan` of another network.
        FileFormatError: a file that is missing, damaged or of another kind.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.zero_()
        ...     layer.weight[:, ::4] = 1.0
        >>> audit(layer, "1:4").ok, audit(layer, "1:8").ok, str(audit(layer).rows[0].pattern)
        (True, False, '1:4')
    """
    record: list[Target] | None = None
    if isinstance(model_or_path, nn.Module):
        layers, read = _of_model(model_or_path)
    elif not isinstance(model_or_path, str | os.PathLike):
        kind = type(model_or_path).__name__
        raise PlanError(f"model_or_path is a {kind}: give a torch.nn.Module, or a path")
    else:
        state, record = _open(Path(model_or_path))
        layers = [(layer, _why_not(layer, state)) for layer in layers_of_state(state.shapes)]
        read = state.read
    if isinstance(pattern, Plan):
        record, pattern = _known(pattern, layers), None
    if pattern is None and record is None:
        return _found(layers, include, exclude, read)
    if record is not None and include is None and not isinstance(pattern, Mapping):
        chosen = _recorded(layers, record, pattern, exclude)
        return _compare(chosen, layers, read, "record" if pattern is None else "pattern")
    if pattern is not None:
        chosen = choose(layers, pattern, include or "all", exclude, remainder="skip")
        return _compare(chosen, layers, read, "pattern")
    within = {t.name for t in choose(layers, EVERY, include or "*", exclude, remainder="skip")}
    chosen = _recorded(layers, [t for t in record or () if t.name in within], None, ())
    return _compare(chosen, layers, read, "record")


def _open(path: Path) -> tuple[SavedState, list[Target] | None]:
    """The weights on disk, and the targets that a record beside them names."""
    if not os.path.isdir(path):
        return open_state(path), None
    if not os.path.lexists(path / _PACKED):
        state = open_state(path)
        return state, read_record(path, state)
    from nmflow.packed.files import container  # imported for packed folders only

    if not container.is_packed(
        path
    ):  # the mark of a checkpoint in training, which has the same name
        state = open_state(path)
        return state, read_record(path, state)
    weights, tensors, aliases = container.read(path)

    def read(name: str) -> Tensor:
        key = aliases.get(name, name)
        if key in tensors:
            return tensors[key]
        container.check_size([weights[key]])  # one at a time is in memory
        return weights[key].dense()

    shapes = {n: w.shape for n, w in weights.items()} | {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    floating = dict.fromkeys(weights, True) | {n: t.is_floating_point() for n, t in tensors.items()}
    for alias, target in aliases.items():
        shapes[alias], floating[alias] = shapes[target], floating[target]
    record = [
        Target(n, w.shape, w.axis, run.pattern, None if whole else (run.start, run.stop))
        for n, w in weights.items()
        for run in w.runs
        for whole in [run[:2] == (0, w.shape[0 if w.axis else 1])]
    ]
    return SavedState(shapes, floating, read), record


def _why_not(layer: Layer, state: SavedState) -> str:
    if not math.prod(layer.shape):
        return "empty"
    return layer.why_not or ("" if state.floating[layer.name] else "not floating point")


def _of_model(model: nn.Module) -> tuple[Layers, Callable[[str], Tensor]]:
    # Packed modules hold no dense weight; whoever made one has imported the room already.
    if any(type(m).__module__.startswith("nmflow.packed.") for m in model.modules()):
        from nmflow.packed import decompress

        model = decompress(model)
    parameters = dict(model.named_parameters())

    def read(name: str) -> Tensor:
        parameter = parameters[name].detach()
        whole = getattr(parameter, "full_tensor", None)
        return whole() if whole is not None else parameter

    return [(layer, layer.why_not) for layer in layers_of(model)], read


def _known(chosen: Plan, layers: Layers) -> list[Target]:
    shapes = {layer.name: layer.shape for layer, _ in layers}
    for target in chosen:
        if shapes.get(target.name) != target.shape:
            raise PlanError(
                f"pattern is a plan that names {target.label} of the shape {target.shape}, which "
                "the network does not have: give the plan of this network"
            )
    return list(chosen)


def _recorded(
    layers: Layers, record: list[Target], pattern: str | Pattern | None, exclude: Names
) -> Plan:
    """The recorded targets that are not excluded, with their own pattern or the given one."""
    barred: set[str] = set()
    if exclude:
        barred = {t.name for t in choose(layers, EVERY, exclude, remainder="skip")}
    targets, others = [], []
    covered: dict[str, list[tuple[int, int]]] = {}
    for target in record:
        asked = target if pattern is None else replace(target, pattern=Pattern(pattern))
        if target.name in barred:
            continue
        out = target.shape[target.out_dim]
        covered.setdefault(target.name, []).append(target.rows or (0, out))
        if target.length % asked.pattern.m:
            why = f"its axis of {target.length} is not a multiple of M={asked.pattern.m}"
            others.append(LeftOut(target.name, why, target.rows))
        else:
            targets.append(asked)
    for layer, why in layers:
        reason = "excluded" if layer.name in barred else why or "not pruned by the run"
        others += [LeftOut(layer.name, reason, rows) for rows in _rest(layer, covered)]
    return Plan(targets, others)


def _rest(
    layer: Layer, covered: Mapping[str, list[tuple[int, int]]]
) -> list[tuple[int, int] | None]:
    """The output rows of a weight that no target covers; None means all of them."""
    if not covered.get(layer.name):
        return [None]
    rest: list[tuple[int, int] | None] = []
    at = 0
    for start, stop in [*sorted(covered[layer.name]), (layer.out, layer.out)]:
        if at < start:
            rest.append((at, start))
        at = max(at, stop)
    return rest


def _found(
    layers: Layers, include: Names | None, exclude: Names, read: Callable[[str], Tensor]
) -> Audit:
    """The sparsest pattern that each weight, or each block of its rows, holds."""
    from nmflow.packed.layout import as_matrix, runs

    taken: Mapping[str, str] | None = None
    if include is not None or exclude:
        taken = {x.name: x.reason for x in choose(layers, EVERY, include or "*", exclude).others}
    targets, others = [], []
    for layer, why in layers:
        reason = why or (taken or {}).get(layer.name, "")
        if not layer.shape or reason:
            others.append(LeftOut(layer.name, reason))
            continue
        weight = _comparable(layer.name, read(layer.name))
        held = list(runs(as_matrix(weight, layer.dim)))
        if layer.stacked and held:  # a row of the matrix is a whole expert here
            named = {Pattern.of(p.n, p.m) for _, _, p in held}
            if len(named) == 1 and held[0][0] == 0 and held[-1][1] == layer.shape[0]:
                targets.append(
                    Target(layer.name, layer.shape, layer.dim, named.pop(), stacked=True)
                )
            else:
                others.append(LeftOut(layer.name, "its matrices hold different patterns"))
            continue
        covered = {layer.name: [(start, stop) for start, stop, _ in held]}
        for start, stop, pattern in held:
            rows = None if (start, stop) == (0, layer.out) else (start, stop)
            targets.append(Target(layer.name, layer.shape, layer.dim, pattern, rows))
        none = "all zero" if not bool((weight != 0).any()) else "holds no N:M pattern"
        others += [LeftOut(layer.name, none, rows) for rows in _rest(layer, covered)]
    return _compare(Plan(targets, others), layers, read, "found")


def _compare(chosen: Plan, layers: Layers, read: Callable[[str], Tensor], judged: str) -> Audit:
    known = {layer.name: layer for layer, _ in layers}
    rows, others = [], []
    for target in chosen:
        weight = rows_of(_comparable(target.name, read(target.name)), target)
        held = holds(weight, target.pattern, target.dim, stacked=target.stacked)
        rows.append(_row(target.label, target.shape, target.pattern, held, weight))
    for other in chosen.others:
        layer = known[other.name]
        if not layer.shape:  # not initialized
            continue
        weight = _comparable(other.name, read(other.name))
        if other.rows is not None:
            start, stop = other.rows
            weight = weight.narrow(layer.out_dim, start, stop - start)
        others.append(_row(other.label, layer.shape, None, None, weight, other.reason))
    return Audit(rows, others, judged)


def _comparable(name: str, weight: Tensor) -> Tensor:
    """A weight in a dtype that compares with zero: one-byte floats become float32."""
    if weight.dtype.itemsize > 1 or weight.dtype in (torch.uint8, torch.int8, torch.bool):
        return weight
    try:
        return weight.float()
    except (RuntimeError, NotImplementedError) as error:
        raise FileFormatError(
            f"{shown(name)} is {weight.dtype}, which cannot be read: audit it as float32"
        ) from error


def _row(
    name: str, shape: tuple[int, ...], pattern: Pattern | None, held: bool | None,
    weight: Tensor, reason: str = "",
) -> AuditRow:  # fmt: skip
    nonzero, total = int((weight != 0).sum()), weight.numel()
    return AuditRow(name, shape, pattern, held, nonzero / max(1, total), nonzero, total, reason)
