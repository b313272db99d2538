"""`plan`: which weights are cut into groups, along which axis, with which pattern, and why not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from nmflow.errors import NMFlowWarning, PlanError
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe, resolve
from nmflow.select.layer import Layer, Part
from nmflow.select.modules import check_model
from nmflow.select.presets import NOT_IN_ALL, PRESETS
from nmflow.select.rules import Rule, Run, append, matches
from nmflow.select.target import LeftOut, Plan, Target, rows_of
from nmflow.select.weights import layers_of
from nmflow.select.wording import could_have, did_you_mean, falls_short, few, uneven, why

__all__ = ["Names", "Patterns", "Plan", "Target", "choose", "plan", "rows_of"]

Patterns = str | Pattern | Mapping[str, str | Pattern]
Names = str | Sequence[str]

_NOT_CHOSEN = "not chosen by"
FROZEN = "frozen: requires_grad is False"
_EXCLUDED = "excluded by "


def plan(
    model: nn.Module,
    pattern: Patterns,
    include: Names = "all",
    exclude: Names = (),
    *,
    remainder: str = "auto",
    recipe: str | Recipe | None = None,
) -> Plan:
    """Choose the weights of a model that are cut into groups, and say why the others are not.

    Nothing is changed: a plan is a pure list.

    Args:
        model: the model; wrappers (compile, DDP, FSDP2, checkpointing) may be around it.
        pattern: a pattern, or a mapping from presets or globs to patterns: the **first** key that
            matches a weight wins, so the more specific key comes first. With a mapping the keys
            are what is included; an `include` that is given too narrows them.
        include: a preset, a glob, or a list of them. Presets: `"ff"`, the matrices of
            feed-forward blocks and of experts; `"qk"`, `"qkv"` and `"attn"`, attention's
            projections (`"attn"` with the output's); `"all"`, everything that can be grouped but
            embeddings, stems, routers, poolers, output heads and positional tables. Globs
            match a parameter's name or its module's path, each also with a dot in front, so that
            `"*.mlp.*"` finds `mlp.fc1.weight`.
            Of a fused projection (`qkv`, `in_proj_weight`, GPT-2's `c_attn`) `"qk"` takes the rows
            of Q and K only.
        exclude: presets or globs that are left out of it.
        remainder: what to do with an axis that M does not divide: `"error"`; `"skip"`, leave it
            out; or `"auto"`, leave it out with a warning where a preset took it, and raise where
            a glob named it.
        recipe: the recipe that will run; targets then note what it does differently on their axis.

    Returns:
        A `Plan`, a list of `Target`. Frozen parameters, dtypes that are not floating point and
        layers that nmflow does not know are in `left_out`, also when a glob names them. If no
        module is an output head by name, the last `nn.Linear` is the head, unless its name says
        that it is part of a block. Experts that one parameter holds are one target, with groups and
        panels in each expert.

    Warns:
        NMFlowWarning: a preset could not take all weights of its role; the plan's `warnings` and
            its table say the same.

    Raises:
        PlanError: a preset or a glob of `include` (or a key of `pattern`) that takes nothing; an
            axis that M does not divide; an unknown `remainder`.
        PatternError: a pattern that cannot be read.

    Example:
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(64, 4, 128)
        >>> [t.label for t in plan(layer, {"ff": "1:16", "qk": "1:4"})]
        ['self_attn.in_proj_weight[0:128]', 'linear1.weight', 'linear2.weight']

    References:
        arXiv 2402.04744, section 4: placements FF, FF and QK, FF and QKV.
    """
    check_model(model, PlanError)
    layers = layers_of(model)
    layers = [(x, x.why_not or (FROZEN if x.frozen else "")) for x in layers]
    chosen = choose(layers, pattern, include, exclude, remainder)
    if recipe is not None:
        known = resolve(recipe)
        for i, target in enumerate(chosen):
            note = known.note(target.pattern, target.length)
            if note:
                joined = "; ".join(filter(None, (target.note, note)))
                chosen[i] = replace(target, note=joined)
    for text in chosen.warnings:
        warnings.warn(text, NMFlowWarning, stacklevel=2)
    return chosen


def choose(
    layers: Sequence[tuple[Layer, str]],
    pattern: Patterns,
    include: Names = "all",
    exclude: Names = (),
    remainder: str = "auto",
) -> Plan:
    """`plan` for layers that are already listed, each with the reason why it cannot be taken."""
    if remainder not in ("auto", "error", "skip"):
        raise PlanError(f"remainder is {remainder!r}: choose 'auto', 'error' or 'skip'")
    narrow = _names("include", include)
    out = _names("exclude", exclude)
    if isinstance(pattern, Mapping):
        rules = [Rule(key, Pattern(spec)) for key, spec in pattern.items()]
        _names("pattern", list(pattern))
        narrow = [] if narrow == ["all"] else narrow
    else:
        rules = [Rule(key, Pattern(pattern)) for key in narrow]
        narrow = []
    if not rules:
        raise PlanError("include is empty: name a preset or a glob, such as 'ff' or '*.mlp.*'")
    limits = dict.fromkeys(narrow, False)
    targets: list[Target] = []
    others: list[LeftOut] = []
    odd: list[Target] = []
    for layer, why_not in layers:
        runs: list[Run] = []
        for part in layer.parts or (Part("other", 0, 0),):
            what, rule = _decide(layer, part, why_not, rules, limits, out)
            append(runs, what, part, rule)
        for run in runs:
            rows = None if run.stop - run.start in (0, layer.out) else (run.start, run.stop)
            if isinstance(run.what, str):
                others.append(LeftOut(layer.name, run.what, rows))
                continue
            target = Target(
                layer.name, layer.shape, layer.dim, run.what, rows, layer.note, layer.stacked,
                layer.unit,
            )  # fmt: skip
            if target.length % run.what.m == 0:
                targets.append(target)
                for rule in run.rules:
                    rule.taken += target.numel
                continue
            reason = f"its axis of {target.length} is not a multiple of M={run.what.m}"
            by_glob = any(rule.key not in PRESETS for rule in run.rules)
            if remainder == "error" or (remainder == "auto" and by_glob):
                odd.append(target)
                continue
            others.append(LeftOut(layer.name, reason, rows))
            for rule in run.rules if remainder == "auto" else ():
                rule.lose_rows(layer, run.stop - run.start, reason)
    _check(rules, limits, layers)
    if odd:
        raise PlanError(uneven(odd))
    if not targets:
        said = why({o.label: o.reason for o in others if not o.reason.startswith(_NOT_CHOSEN)})
        raise PlanError(
            f"nothing of what include names is left to prune, {said}: choose another pattern or "
            "other weights"
        )
    said = [falls_short(rule.key, rule.taken, rule.lost) for rule in rules if rule.lost]
    return Plan(targets, others, said)


def _decide(
    layer: Layer,
    part: Part,
    why_not: str,
    rules: list[Rule],
    limits: dict[str, bool],
    exclude: list[str],
) -> tuple[Pattern | str, Rule | None]:
    """The pattern of one part of a weight and the rule behind it, or the reason why it has none."""
    hits = [rule for rule in rules if matches(rule.key, layer, part)]
    keys = ", ".join(repr(rule.key) for rule in rules)
    if not hits:
        if part.role in ("qkv", "kv") and any(rule.key == "qk" for rule in rules):
            reason = (
                "its query, key and value rows are interleaved or not of equal size, so they can "
                "only be taken whole, with 'qkv', 'attn' or a glob"
            )
            barred = any(matches(key, layer, part) for key in exclude)
            for rule in rules if not barred else ():
                if rule.key == "qk":
                    rule.lose(layer, part, why_not or reason)
            return why_not or reason, None
        if part.role in NOT_IN_ALL and any(rule.key == "all" for rule in rules):
            return NOT_IN_ALL[part.role], None
        return f"{_NOT_CHOSEN} {keys}", None
    within = [key for key in limits if matches(key, layer, part)]
    barred = next((key for key in exclude if matches(key, layer, part)), None)
    meant = ""
    if limits and not within:
        meant = f"outside of include, {', '.join(map(repr, limits))}"
    if barred is not None:
        meant = meant or f"{_EXCLUDED}{barred!r}"
    if why_not and not meant:
        for rule in hits:
            rule.lose(layer, part, why_not)
    if why_not or meant:
        for rule in hits:
            rule.missed[layer.name] = meant or why_not
        return meant or why_not, None
    for key in within:
        limits[key] = True
    hits[0].took += 1
    for rule in hits[1:]:
        rule.missed[layer.name] = f"taken by the earlier {hits[0].key!r}"
    return hits[0].pattern, hits[0]


def _names(argument: str, given: Names) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise PlanError(
            f"{argument} is {given!r}: give a preset ({', '.join(PRESETS)}), a glob, or a list of "
            "them"
        )
    return list(dict.fromkeys(names))


def _check(rules: list[Rule], limits: dict[str, bool], layers: Sequence[tuple[Layer, str]]) -> None:
    """Raise if a key took nothing, so that a misspelt glob is noticed."""
    for rule in rules:
        wanted = {n: why for n, why in rule.missed.items() if not why.startswith(_EXCLUDED)}
        if rule.took == 0 and wanted and set(wanted.values()) == {FROZEN}:
            raise PlanError(
                f"{rule.key!r} takes nothing, since all that it matches is frozen (requires_grad "
                f"is False: {few(list(wanted), 3)}), so nothing would train it: call "
                "requires_grad_(True) and give it to the optimizer, or, where only adapters "
                "train, merge them first and train the merged model"
            )
        if rule.took == 0 and rule.missed:
            raise PlanError(
                f"{rule.key!r} takes nothing of what it matches, {why(rule.missed)}: leave it "
                "out, put it before the key that takes its weights, or name others"
            )
        if rule.took == 0:
            raise PlanError(
                f"{rule.key!r} matches no weight{did_you_mean(rule.key, layers)}; "
                f"{could_have(layers)}"
            )
    for key, used in limits.items():
        if not used:
            raise PlanError(
                f"include {key!r} takes nothing that pattern names{did_you_mean(key, layers)}; "
                f"{could_have(layers)}"
            )
