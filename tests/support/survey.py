"""One row of the table of models: what each preset takes of the role that class names give it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from judge import Judged, Share, count, judge, shares
from nmflow.errors import PlanError
from nmflow.select.plan import Plan, choose
from nmflow.select.weights import layers_of
from reasons import reason

PRESETS = ("ff", "qk", "qkv", "attn", "all")
_ASKED = ": only a glob takes it"
"""How a plan ends the reason for weights that `"all"` passes by on purpose."""


@dataclass
class Row:
    """One model.

    Attributes:
        library: where it comes from.
        name: its type.
        model: the class that was built.
        weights: how many weights it has, at the size that was built.
        shares: by preset, what it takes of its role; not there where a model has none of it.
        reasons: by preset, the reasons for what it leaves out.
        unexplained: by preset, names of what it leaves out without a reason.
        beyond: by preset, names of what it takes that the class names give to another role.
    """

    library: str
    name: str
    model: str
    weights: int
    shares: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    unexplained: dict[str, list[str]] = field(default_factory=dict)
    beyond: dict[str, list[str]] = field(default_factory=dict)


def row_of(library: str, name: str, model: nn.Module) -> Row:
    """Measure one model; every pattern would do, so `1:1` is taken, which divides every axis."""
    layers = [(x, x.why_not) for x in layers_of(model)]
    plans = {preset: _plan(layers, preset) for preset in PRESETS}
    judged = judge(model)
    found, beyond = shares(judged, {p: {t.name for t in made} for p, made in plans.items()})
    row = Row(library, name, type(model).__name__, count(model))
    row.beyond = {p: names for p, names in beyond.items() if names}
    roles = {x.name: x for x in judged}
    for preset, share in found.items():
        if share.total:
            row.shares[preset] = share.taken / share.total
            _explain(row, preset, share, plans[preset], roles)
    return row


def _explain(row: Row, preset: str, share: Share, made: Plan, roles: dict[str, Judged]) -> None:
    left = {label.partition("[")[0]: said for label, said in made.left_out}
    for name in share.missed:
        said = reason(row.name, preset, name)
        # Where class names say nothing, the plan's own word on heads and embeddings counts.
        if not said and preset == "all" and roles[name].role == "other":
            said = left.get(name, "") if left.get(name, "").endswith(_ASKED) else ""
        where = row.reasons if said else row.unexplained
        listed = where.setdefault(preset, [])
        text = said.removesuffix(_ASKED) or name
        if text not in listed:
            listed.append(text)


def _plan(layers: list, preset: str) -> Plan:
    try:
        return choose(layers, "1:1", preset, (), "skip")
    except PlanError:  # it has none of the role
        return Plan()
