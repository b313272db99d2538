"""`plan`: which weights are cut into groups, along which axis, with which pattern, and why not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from nmflow.errors import PlanError
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe, resolve
from nmflow.select.roles import NOT_IN_ALL, PRESETS
from nmflow.select.target import LeftOut, Plan, Target, rows_of
from nmflow.select.weights import Layer, Part, layers_of

__all__ = ["Names", "Patterns", "Plan", "Target", "choose", "plan", "rows_of"]

Patterns = str | Pattern | Mapping[str, str | Pattern]
Names = str | Sequence[str]

_FROZEN = "frozen: requires_grad is False"
_EXCLUDED = "excluded by "


def plan(
    model: nn.Module,
    pattern: Patterns,
    include: Names = "all",
    exclude: Names = (),
    remainder: str = "error",
    recipe: str | Recipe | None = None,
) -> Plan:
    """Choose the weights of a model that are cut into groups, and say why each other is not.

    Nothing is changed: a plan is a pure list.

    Args:
        model: the model; wrappers (compile, DDP, FSDP2, checkpointing) may be around it.
        pattern: a pattern, or a mapping from presets or globs to patterns: the **first** key that
            matches a weight wins, so the more specific key comes first. With a mapping the keys
            are what is included; an `include` that is given too narrows them.
        include: a preset, a glob, or a list of them. Presets: `"ff"`, the matrices of
            feed-forward blocks; `"qk"`, `"qkv"` and `"attn"`, attention's projections (`"attn"`
            with the output's); `"all"`, everything that can be grouped but embeddings, output
            heads and positional tables. Globs match a parameter's name or its module's path, each
            also with a dot in front, so that `"*.mlp.*"` finds `mlp.fc1.weight`.
            Of a fused projection (`qkv`, `in_proj_weight`, GPT-2's `c_attn`) `"qk"` takes the rows
            of Q and K only.
        exclude: presets or globs that are left out of it.
        remainder: what to do with an axis that M does not divide: `"error"` or `"skip"`.
        recipe: the recipe that will run; targets then note what it does differently on their axis.

    Returns:
        A `Plan`, a list of `Target`. Frozen parameters, dtypes that are not floating point and
        layers that nmflow does not know are in `left_out`, also when a glob names them. Where no
        module is an output head by name, the last `nn.Linear` is it, unless its name says that it
        is part of a block.

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
    if not isinstance(model, nn.Module):
        raise PlanError(f"model is of type {type(model).__name__}: give a torch.nn.Module")
    layers = layers_of(model)
    layers = [(x, x.why_not or (_FROZEN if x.frozen else "")) for x in layers]
    chosen = choose(layers, pattern, include, exclude, remainder)
    if recipe is not None:
        known = resolve(recipe)
        for i, target in enumerate(chosen):
            note = known.note(target.pattern, target.length)
            if note:
                joined = "; ".join(filter(None, (target.note, note)))
                chosen[i] = replace(target, note=joined)
    return chosen


@dataclass
class _Rule:
    """A key with its pattern, and what became of the weights that it matches."""

    key: str
    pattern: Pattern
    took: int = 0
    missed: dict[str, str] = field(default_factory=dict)


def choose(
    layers: Sequence[tuple[Layer, str]],
    pattern: Patterns,
    include: Names = "all",
    exclude: Names = (),
    remainder: str = "error",
) -> Plan:
    """`plan` on layers that are already listed, each with the reason why it cannot be taken."""
    if remainder not in ("error", "skip"):
        raise PlanError(f"remainder is {remainder!r}: choose 'error' or 'skip'")
    narrow = _names("include", include)
    out = _names("exclude", exclude)
    if isinstance(pattern, Mapping):
        rules = [_Rule(key, Pattern(spec)) for key, spec in pattern.items()]
        _names("pattern", list(pattern))
        narrow = [] if narrow == ["all"] else narrow
    else:
        rules = [_Rule(key, Pattern(pattern)) for key in narrow]
        narrow = []
    if not rules:
        raise PlanError("include is empty: name a preset or a glob, such as 'ff' or '*.mlp.*'")
    limits = dict.fromkeys(narrow, False)
    targets: list[Target] = []
    others: list[LeftOut] = []
    uneven: list[Target] = []
    for layer, why_not in layers:
        parts: list[tuple[Part, Pattern | str]] = []
        for part in layer.parts or (Part("other", 0, 0),):
            parts.append((part, _decide(layer, part, why_not, rules, limits, out)))
        for what, start, stop in _merge(parts):
            rows = None if stop - start in (0, layer.out) else (start, stop)
            if isinstance(what, str):
                others.append(LeftOut(layer.name, what, rows))
                continue
            target = Target(layer.name, layer.shape, layer.dim, what, rows, layer.note)
            if target.length % what.m == 0:
                targets.append(target)
            elif remainder == "skip":
                reason = f"its axis of {target.length} is no multiple of M={what.m}"
                others.append(LeftOut(layer.name, reason, rows))
            else:
                uneven.append(target)
    _check(rules, limits, layers)
    if uneven:
        raise PlanError(_uneven(uneven))
    if not targets:
        why = _why({other.label: other.reason for other in others})
        raise PlanError(
            f"nothing is left to prune of what include names, {why}: choose another pattern or "
            "other weights"
        )
    return Plan(targets, others)


def _decide(
    layer: Layer,
    part: Part,
    why_not: str,
    rules: list[_Rule],
    limits: dict[str, bool],
    exclude: list[str],
) -> Pattern | str:
    """The pattern of one part of a weight, or the reason why it has none."""
    hits = [rule for rule in rules if _matches(rule.key, layer, part)]
    keys = ", ".join(repr(rule.key) for rule in rules)
    if not hits:
        if part.role in ("qkv", "kv") and any(rule.key == "qk" for rule in rules):
            reason = (
                "its query, key and value rows are interleaved or not of equal size, so they can "
                "only be taken whole, with 'qkv', 'attn' or a glob"
            )
            for rule in rules:
                if rule.key == "qk":
                    rule.missed[layer.name] = reason
            return reason
        if part.role in NOT_IN_ALL and any(rule.key == "all" for rule in rules):
            return NOT_IN_ALL[part.role]
        return f"not chosen by {keys}"
    within = [key for key in limits if _matches(key, layer, part)]
    barred = next((key for key in exclude if _matches(key, layer, part)), None)
    reason = why_not
    if limits and not within:
        reason = reason or f"outside of include, {', '.join(map(repr, limits))}"
    if barred is not None:
        reason = reason or f"{_EXCLUDED}{barred!r}"
    if reason:
        for rule in hits:
            rule.missed[layer.name] = reason
        return reason
    for key in within:
        limits[key] = True
    hits[0].took += 1
    for rule in hits[1:]:
        rule.missed[layer.name] = f"taken by the earlier {hits[0].key!r}"
    return hits[0].pattern


def _matches(key: str, layer: Layer, part: Part) -> bool:
    if key in PRESETS:
        return part.role in PRESETS[key]
    return any(fnmatchcase(t, key) or fnmatchcase(f".{t}", key) for t in layer.paths)


def _merge(parts: list[tuple[Part, Pattern | str]]) -> list[tuple[Pattern | str, int, int]]:
    """Join neighbouring parts that share their fate."""
    merged: list[tuple[Pattern | str, int, int]] = []
    for part, what in parts:
        if merged and merged[-1][0] == what and merged[-1][2] == part.start:
            merged[-1] = (what, merged[-1][1], part.stop)
        else:
            merged.append((what, part.start, part.stop))
    return merged


def _names(argument: str, given: Names) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise PlanError(
            f"{argument} is {given!r}: give a preset ({', '.join(PRESETS)}), a glob, or a list of "
            "them"
        )
    return list(dict.fromkeys(names))


def _check(
    rules: list[_Rule], limits: dict[str, bool], layers: Sequence[tuple[Layer, str]]
) -> None:
    """Raise if a key took nothing: a misspelt glob must not pass in silence."""
    for rule in rules:
        wanted = {n: why for n, why in rule.missed.items() if not why.startswith(_EXCLUDED)}
        if rule.took == 0 and wanted and set(wanted.values()) == {_FROZEN}:
            raise PlanError(
                f"{rule.key!r} takes nothing, since all that it matches is frozen "
                f"(requires_grad is False: {_few(list(wanted), 3)}), so that nothing would train "
                "it: call requires_grad_(True) and give it to the optimizer, or, where only "
                "adapters train, merge them first and train the merged model"
            )
        if rule.took == 0 and rule.missed:
            raise PlanError(
                f"{rule.key!r} takes nothing of what it matches, {_why(rule.missed)}: leave it "
                "out, put it before the key that takes its weights, or name others"
            )
        if rule.took == 0:
            raise PlanError(
                f"{rule.key!r} matches no weight{_near(rule.key, layers)}; {_could_have(layers)}"
            )
    for key, used in limits.items():
        if not used:
            raise PlanError(
                f"include {key!r} takes nothing that pattern names; {_could_have(layers)}"
            )


def _near(key: str, layers: Sequence[tuple[Layer, str]]) -> str:
    """The preset or the name that was probably meant; of a glob, the text between its stars."""
    texts = [text for layer, _ in layers for text in layer.paths]
    words = {part for text in texts for part in text.split(".") if not part.isdigit()}
    presets = difflib.get_close_matches(key, PRESETS, 1, 0.5)
    found = presets or difflib.get_close_matches(key, texts, 1)
    if not found and "*" in key:
        parts = [part for part in re.split(r"[*.?\[\]]+", key) if part and part not in words]
        near = {p: difflib.get_close_matches(p, sorted(words), 1) for p in parts}
        found = [key.replace(p, close[0]) for p, close in near.items() if close][:1]
    return f": did you mean {found[0]!r}?" if found else ""


def _could_have(layers: Sequence[tuple[Layer, str]]) -> str:
    found: dict[str, list[str]] = {}
    for layer, why_not in layers:
        for part in layer.parts:
            if not why_not and layer.name not in found.setdefault(part.role, []):
                found[part.role].append(layer.name)
    said = [f"{role}: {_few(names, 3)}" for role, names in found.items() if names]
    return f"what could be named, by role: {'; '.join(said) or 'nothing in this model'}"


def _uneven(uneven: list[Target]) -> str:
    target = uneven[0]
    more = f" (and {len(uneven) - 1} more: {_few([t.label for t in uneven[1:]], 3)})"
    return (
        f"{target.label} has an axis of {target.length}, which is no multiple of "
        f"M={target.pattern.m} in {target.pattern}{more if uneven[1:] else ''}: exclude it, give "
        "it another pattern, or pass remainder='skip'"
    )


def _why(reasons: Mapping[str, str]) -> str:
    """Names by their reason, as one phrase."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return ", ".join(f"{_few(found, 3)} ({reason})" for reason, found in names.items())


def _few(names: Sequence[str], count: int = 5) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
