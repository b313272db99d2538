"""What a plan says: names by their reasons, shares, and what a misspelt key may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from nmflow.select.layer import Layer
from nmflow.select.presets import PRESETS
from nmflow.select.target import Target


def why(reasons: Mapping[str, str]) -> str:
    """Names by their reason, as one phrase."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return ", ".join(f"{few(found, 3)} ({reason})" for reason, found in names.items())


def few(names: Sequence[str], count: int = 5) -> str:
    """The first of some names, and how many more there are."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


_NONE = (
    "nothing in this model (a packed one has no weights to choose: give what nmflow.decompress "
    "returns)"
)


def could_have(layers: Sequence[tuple[Layer, str]]) -> str:
    """Weights that could be named, by role."""
    found: dict[str, list[str]] = {}
    for layer, why_not in layers:
        for part in layer.parts:
            if not why_not and layer.name not in found.setdefault(part.role, []):
                found[part.role].append(layer.name)
    said = [f"{role}: {few(names, 3)}" for role, names in found.items() if names]
    return f"what could be named, by role: {'; '.join(said) or _NONE}"


def uneven(targets: Sequence[Target]) -> str:
    """The error about axes that M does not divide."""
    target = targets[0]
    more = f" (and {len(targets) - 1} more: {few([t.label for t in targets[1:]], 3)})"
    return (
        f"{target.label} has an axis of {target.length}, which is not a multiple of "
        f"M={target.pattern.m} in {target.pattern}{more if targets[1:] else ''}: exclude it, give "
        "it another pattern, or pass remainder='skip'"
    )


def falls_short(key: str, taken: int, lost: Mapping[str, tuple[int, str]]) -> str:
    """The warning about a preset that could not take all of its role."""
    missing = sum(count for count, _ in lost.values())
    reasons = {name: reason for name, (_, reason) in lost.items()}
    return (
        f"{key!r} leaves out {missing / (taken + missing):.1%} of the weights that it names, "
        f"{why(reasons)}: name them with a glob, give another pattern, or exclude them to silence "
        "this warning"
    )


def did_you_mean(key: str, layers: Sequence[tuple[Layer, str]]) -> str:
    """The preset or the name that was probably meant, as a phrase, or nothing.

    Of a glob it is the text between its stars that is compared; a name that is only a part of a
    path becomes a glob.
    """
    texts = list(dict.fromkeys(text for layer, _ in layers for text in layer.paths))
    words = sorted({part for text in texts for part in text.split(".") if not part.isdigit()})
    found = difflib.get_close_matches(key, PRESETS, 1, 0.5) or difflib.get_close_matches(key, texts)
    if not found and "*" in key:
        parts = [part for part in re.split(r"[*.?\[\]]+", key) if part and part not in words]
        near = {p: difflib.get_close_matches(p, words, 1) for p in parts}
        found = [key.replace(p, close[0]) for p, close in near.items() if close]
    if not found:
        core = key.strip("*.?")
        found = [f"*.{word}.*" for word in difflib.get_close_matches(core, words, 1)]
        found += [f"*{core}*"] if any(core in text for text in texts) else []
    return next((f": did you mean {one!r}?" for one in found if one != key), "")
