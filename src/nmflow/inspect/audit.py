"""`audit`: does every weight of a network, in memory or on disk, hold its pattern?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from nmflow.inspect.checkpoints import SavedState, open_state, state_of
from nmflow.masks import holds
from nmflow.pattern import Pattern
from nmflow.select.plan import Names, Patterns, choose
from nmflow.select.states import layers_of_state
from nmflow.select.target import Plan, rows_of
from nmflow.select.weights import Layer, layers_of
from nmflow.text_table import table

_PACKED = "nmflow.json"
"""The header of a folder that `nmflow.save` wrote."""


@dataclass(frozen=True)
class AuditRow:
    """One weight, or the output rows of one that share a pattern.

    Attributes:
        name: the parameter's name, with its rows where only some are meant: `qkv.weight[0:64]`.
        shape: the parameter's shape.
        pattern: the pattern that it is held against; None for a weight that was left out.
        holds: whether at most N of every M are not zero; None where there is no pattern.
        density: nonzero / total.
        nonzero: weights that are not zero.
        total: weights.
        reason: why it was left out.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    holds: bool | None
    density: float
    nonzero: int
    total: int
    reason: str = ""


@dataclass(frozen=True)
class Audit:
    """The findings; as `str`, a table of every weight.

    Attributes:
        rows: the weights that a pattern was asked of.
        others: every other weight of at least two dimensions, with the reason.
    """

    rows: list[AuditRow] = field(default_factory=list)
    others: list[AuditRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every weight that a pattern was asked of holds it."""
        return all(row.holds for row in self.rows)

    @property
    def density(self) -> float:
        """The share of weights that are not zero, over `rows`."""
        return sum(row.nonzero for row in self.rows) / max(1, sum(row.total for row in self.rows))

    def __str__(self) -> str:
        lines = [("weight", "shape", "pattern", "held", "density", "nonzero", "of", "left out")]
        for row in (*self.rows, *self.others):
            lines.append((
                row.name, "x".join(map(str, row.shape)), str(row.pattern or "-"),
                {True: "yes", False: "NO", None: "-"}[row.holds], f"{row.density:.2%}",
                f"{row.nonzero:,}", f"{row.total:,}", row.reason,
            ))  # fmt: skip
        broken = sum(not row.holds for row in self.rows)
        verdict = f"{broken} of {len(self.rows)} weights break" if broken else "every weight holds"
        return (
            f"{table(lines, right=(4, 5, 6))}\n{verdict} the pattern; density {self.density:.2%} "
            f"over {len(self.rows)} weights"
        )


def audit(
    model_or_path: nn.Module | str | Path,
    pattern: Patterns,
    include: Names = "all",
    exclude: Names = (),
) -> Audit:
    """Check that a network holds its patterns: at most N of every M weights are not zero.

    Args:
        model_or_path: a model, also a packed or a frozen one; or a `.safetensors`, `.pt`, `.pth`,
            `.bin` or `.ckpt` file, a folder of Hugging Face's (sharded or not), or one that
            `nmflow.save` wrote.
        pattern: a pattern, or a mapping from presets or globs to patterns, as in `plan`.
        include: as in `plan`.
        exclude: as in `plan`.

    Returns:
        An `Audit`. Weights whose axis M does not divide are left out, with the reason. A bare
        file says only names and shapes: axes and roles are told from these, HF's `Conv1D` by the
        names of GPT-2, and embeddings and heads by the usual ones; name others in `exclude`.
        Sharded parameters (FSDP2) are gathered, so every rank has to call it.

    Raises:
        PlanError: a preset or a glob that takes nothing.
        FileFormatError: a file that is missing, damaged or of another kind.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.zero_()
        ...     layer.weight[:, ::4] = 1.0
        >>> audit(layer, "1:4").ok, audit(layer, "1:8").ok
        (True, False)
    """
    if isinstance(model_or_path, nn.Module):
        layers, read = _of_model(model_or_path)
    else:
        state = _open(model_or_path)
        layers = [
            (layer, layer.why_not or ("" if state.floating[layer.name] else "not floating point"))
            for layer in layers_of_state(state.shapes)
        ]
        read = state.read
    chosen = choose(layers, pattern, include, exclude, remainder="skip")
    return _compare(chosen, {layer.name: layer for layer, _ in layers}, read)


def _open(path: str | Path) -> SavedState:
    if not (Path(path) / _PACKED).is_file():
        return open_state(path)
    from nmflow.packed import load_state  # a later room, which imports this one's neighbours

    return state_of(load_state(path))


def _of_model(model: nn.Module) -> tuple[list[tuple[Layer, str]], Callable[[str], Tensor]]:
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


def _compare(chosen: Plan, layers: dict[str, Layer], read: Callable[[str], Tensor]) -> Audit:
    rows, others = [], []
    for target in chosen:
        weight = rows_of(read(target.name), target)
        held = holds(weight, target.pattern, target.dim, target.stacked)
        rows.append(_row(target.label, target.shape, target.pattern, held, weight))
    for label, reason in chosen.left_out:
        name, _, cut = label.partition("[")
        layer = layers[name]
        if not layer.shape:
            continue
        weight = read(name)
        if cut:
            start, stop = map(int, cut.rstrip("]").split(":"))
            weight = weight.narrow(layer.out_dim, start, stop - start)
        others.append(_row(label, layer.shape, None, None, weight, reason))
    return Audit(rows, others)


def _row(
    name: str, shape: tuple[int, ...], pattern: Pattern | None, held: bool | None,
    weight: Tensor, reason: str = "",
) -> AuditRow:  # fmt: skip
    nonzero, total = int(torch.count_nonzero(weight)), weight.numel()
    return AuditRow(name, shape, pattern, held, nonzero / max(1, total), nonzero, total, reason)
