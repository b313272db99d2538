"""Which weights of a model hold a pattern, and which of them can be packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.packed import build
from nmflow.packed.build import Run
from nmflow.packed.layout import as_matrix, fits, runs
from nmflow.pattern import EVERY, Pattern
from nmflow.select.layer import Layer
from nmflow.select.modules import check_model
from nmflow.select.plan import Names, Patterns, choose
from nmflow.select.weights import layers_of, path_of


@dataclass(frozen=True)
class Found:
    """A weight of a model, the runs of its rows that hold a pattern, and why it stays dense.

    Attributes:
        layer: name, shape and grouped axis.
        site: the path of the module that a packed one would replace.
        own: the parameter's name in that module.
        runs: half-open runs of output rows with their patterns; empty where none holds.
        why_not: why it cannot be packed; empty if it can.
    """

    layer: Layer
    site: str
    own: str
    runs: list[Run]
    why_not: str = ""

    @property
    def patterns(self) -> str:
        """The patterns as text, with the rows where they are not the whole weight's."""
        if len(self.runs) == 1 and self.runs[0][:2] == (0, self.layer.out):
            return str(self.runs[0].pattern)
        return ", ".join(f"{r.pattern} [{r.start}:{r.stop}]" for r in self.runs)


def check_unsharded(model: nn.Module) -> None:
    """Raise `CompressError` unless a thing is a network whose weights are not sharded."""
    check_model(model, CompressError)
    cut = [name for name, p in model.named_parameters() if _is_a(p, "DTensor")]
    if cut or any(_is_a(module, "FSDPModule") for module in model.modules()):
        first = f" ('{cut[0]}' is a DTensor)" if cut else ""
        raise CompressError(
            f"model is sharded over processes{first}: gather its weights with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict (full_state_dict=True), "
            "load them into a network that is not sharded, and give that"
        )


def _is_a(thing: object, name: str) -> bool:
    """By the name of the class, since importing those of torch's distribution takes seconds."""
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def survey(
    model: nn.Module,
    pattern: Patterns | None = None,
    include: Names = "*",
    exclude: Names = (),
) -> list[Found]:
    """Look at every weight of at least two dimensions; changes nothing.

    Raises:
        PlanError, PatternError: as for `plan`.
    """
    modules = dict(model.named_modules())
    layers = [
        (layer, _batch(modules, layer) or layer.why_not or _unread(model, layer))
        for layer in layers_of(model)
    ]
    everything = include == "*" and not exclude and not isinstance(pattern, Mapping)
    rows: dict[str, list[tuple[int, int, Pattern]]] = {}
    reasons: dict[str, str] = {}
    if everything:  # `choose` would raise where there is nothing to take
        one = EVERY if pattern is None else Pattern(pattern)  # pyright: ignore[reportArgumentType]
        for layer, why in layers:
            if why:
                reasons[layer.name] = why
            else:
                rows[layer.name] = [(0, layer.out, one)]
    else:
        narrow = () if isinstance(pattern, Mapping) and include == "*" else include
        wanted = choose(layers, pattern or EVERY, narrow, exclude, "skip")
        reasons = dict(wanted.left_out)
        for t in wanted:
            span = t.rows or (0, t.shape[t.out_dim])
            rows.setdefault(t.name, []).append((span[0], span[1], t.pattern))
    holders = _holders(model)
    parameters = dict(model.named_parameters())
    found = []
    for layer, _ in layers:
        site, own = build.site_of(layer.name, modules)
        if layer.name not in rows:
            why = reasons.get(layer.name, "not chosen")
            found.append(Found(layer, site, own, [], why))
            continue
        weight = parameters[layer.name].detach()
        held, why = _runs(as_matrix(weight, layer.dim), rows[layer.name], pattern is None)
        shared = holders[id(parameters[layer.name])]
        if not why and len(shared) > 1:
            why = f"shared by several modules ({', '.join(shared)})"
        if not why:
            module, name = modules[site], own
            if own.startswith("out_proj."):
                module, name = modules[path_of(layer.name)], "weight"
            why = build.why_not(module, name) or build.why_not_runs(module, held)
            if not why and module is not modules[site]:
                why = build.why_not(modules[site], "in_proj_bias")
        found.append(Found(layer, site, own, held, why))
    return found


def _runs(
    matrix: Tensor, rows: list[tuple[int, int, Pattern]], any_pattern: bool
) -> tuple[list[Run], str]:
    """The runs of a matrix that hold a pattern, or why there is none."""
    held: list[Run] = []
    why = ""
    for start, stop, pattern in rows:
        part = matrix[start:stop]
        if any_pattern:
            held += [Run(start + a, start + b, p) for a, b, p in runs(part)]
            why = why or "holds no N:M pattern"
        elif (reason := fits(part, pattern)) is None:
            held.append(Run(start, stop, pattern))
        else:
            why = why or reason
    return held, "" if held else why


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """The paths of the distinct modules that hold each parameter."""
    held: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            held.setdefault(id(parameter), []).append(path)
    return held


def _batch(modules: Mapping[str, nn.Module], layer: Layer) -> str:
    """Why a parameter of three axes stays dense if it does not belong to a convolution."""
    holder = modules.get(layer.name.rpartition(".")[0])
    convolution = isinstance(holder, nn.Conv1d | nn.ConvTranspose1d)
    if layer.stacked or layer.unit or (len(layer.shape) == 3 and not convolution):
        return "a batch of matrices, such as the weights of experts, stays dense"
    return ""


def _unread(model: nn.Module, layer: Layer) -> str:
    """Why a parameter's values cannot be read here as a matrix."""
    parameter = model.get_parameter(layer.name)
    if type(parameter.data) is not Tensor or parameter.is_meta:
        return f"its values are not in this process ({type(parameter.data).__name__})"
    if parameter.layout != torch.strided:
        return f"stored as {parameter.layout}"
    return ""
