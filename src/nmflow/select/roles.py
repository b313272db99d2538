"""What a weight does in a network, from names and shapes: pure functions.

Roles are `"q"`, `"k"`, `"v"`, `"o"` (attention's projections), `"qkv"` and `"kv"` (fused ones),
`"attn"` (what else attention multiplies with), `"ff"` (the matrices of a feed-forward block, also
of experts), `"mixer"` (state spaces and linear recurrences), `"router"`, `"stem"`, `"head"`,
`"embedding"`, `"position"`, `"adapter"`, `"pooler"` and `"other"`. Presets are sets of roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nmflow.select import role_names as names
from nmflow.select.presets import NOT_IN_ALL

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")


def clean(name: str) -> str:
    """The name without the prefixes of wrappers (compile, checkpointing, DDP)."""
    name = _WRAPPERS.sub(r"\1", "." + name).replace("..", ".").strip(".")
    return name.removeprefix("module.")


def role_of(
    path: str,
    shape: Sequence[int] = (1, 1),
    beside: str = "",
    kinds: Sequence[str] = (),
    experts: int = 0,
) -> str:
    """The role of the weight of the module at `path` (or of the parameter at `path`).

    Args:
        path: a module's path, such as `"layers.0.mlp.fc1"`, or, where a module owns several
            weights, a parameter's: `"layers.0.self_attn.in_proj_weight"`.
        shape: (out, in, …) of the weight: a convolution called `fc1` is no feed-forward matrix
            unless it sits in a module that says so, and a `gate` that narrows is a router.
        beside: the result of `owners` for the module around it.
        kinds: class names of the modules around it, the nearest first; they decide where names
            do not.
        experts: the number of experts, if a module around it has one.

    Example:
        >>> role_of("layer.0.attention.output.dense"), role_of("layer.0.output.dense")
        ('o', 'ff')
    """
    parts = [part for part in path.split(".") if part not in ("base_layer", "default")]
    named = [part for part in parts if not part.isdigit()] or [""]
    last, matrix = named[-1], len(shape) == 2 or all(size == 1 for size in shape[2:])
    if any(part.startswith("lora_") for part in parts):
        return "adapter"
    if _routes(named, shape, kinds, experts):
        return "router"
    around = _around(named[:-1])
    attention = beside == "attn" and around not in ("ff", "linear")
    own = _outside(last)
    if (own and not (attention or around == "attn")) or own == "position":
        return own
    if not beside and (parts[0] == "cls" or (last in names.TOP_HEADS and len(parts) == 1)):
        return "head"
    if parts[0] == "generator" and len(parts) == 2:
        return "head"
    if around == "ff":
        return "ff"
    if beside == "mixer" or around == "linear":
        return "mixer"
    if around == "mixer" and not attention:  # NemotronH uses this name for all of its blocks
        return "ff" if _by_kind(kinds[:2]) == "ff" else "mixer"
    if around in NOT_IN_ALL and not attention:
        return around
    if not matrix:  # a convolution over places
        return _projection(last) or "other"
    return _inside(named, shape, attention, around == "attn", kinds)


def _inside(
    named: list[str], shape: Sequence[int], attention: bool, near: bool, kinds: Sequence[str]
) -> str:
    """The role of a matrix in a block, by its name, then by the classes around it."""
    last = named[-1]
    by_name = _projection(last)
    if by_name and (last != "r" or near):
        return by_name
    if names.FF_PART.fullmatch(last) or last in names.EXPERTS:
        return "ff"
    ff = (
        last in names.FF or (last in ("dense", "conv1", "conv2") and _dense(named)) or last == "ffn"
    )
    kind = _by_kind(kinds)
    if near or (attention and not ff) or (kind == "attn" and not ff):
        words = set(re.split(r"_", last.lower()))
        said = next((role for role, telling in names.WORDS if words & telling), "")
        return said or ("o" if last in names.OUT_IN_ATTENTION else "attn")
    return "ff" if ff and (len(shape) == 2 or last.startswith("conv")) else kind


def _dense(named: list[str]) -> bool:
    return len(named) > 1 and bool(names.FF_DENSE.fullmatch(named[-2]))


def _routes(named: list[str], shape: Sequence[int], kinds: Sequence[str], experts: int) -> bool:
    said = any(part in names.ROUTERS or names.ROUTER_PART.fullmatch(part) for part in named)
    if said or any(names.ROUTER_KIND.search(kind) for kind in kinds[:3]):
        return True
    last = named[-1] if named[-1] not in ("wg", "classifier") else "gate"
    if last != "gate" or len(shape) != 2 or "experts" in named[:-1]:
        return False
    if experts:
        return shape[0] == experts
    # Without a number, a gate of a feed-forward block that narrows: a GLU's gate widens.
    inside = any(names.FF_PART.fullmatch(part) or part in names.EXPERTS for part in named[:-1])
    return shape[0] < shape[1] and inside


def _outside(part: str) -> str:
    """The role of a weight that no preset prunes, by its name, or ""."""
    if _projection(part):
        return ""
    if names.POSITION.fullmatch(part):
        return "position"
    if part in names.HEADS or names.HEAD_PART.fullmatch(part):
        return "head"
    if part in names.EMBEDDING or names.EMBEDDING_PART.fullmatch(part):
        return "embedding"
    return "pooler" if names.POOLER.fullmatch(part) else ""


def _around(ancestors: list[str]) -> str:
    """The role that the nearest telling ancestor gives; `"linear"` for linear attention."""
    found = ""
    for part in reversed(ancestors):
        said = _outside(part)
        if names.TRUNK.fullmatch(part):  # an embedding or a head may hold a whole network
            return found
        if part in names.EXPERTS:
            found = "ff"
        elif said:
            return found or said
        elif names.MIXER_PART.fullmatch(part):
            return found or ("mixer" if part in names.MIXERS else "linear")
        elif names.FF_PART.fullmatch(part):
            return "ff"
        elif names.ATTENTION_PART.fullmatch(part):
            return "attn"
    return found


def _projection(last: str) -> str:
    return next((role for role, telling in names.PROJECTIONS.items() if last in telling), "")


def _by_kind(kinds: Sequence[str]) -> str:
    for kind in kinds[:3]:
        if names.MIXER_KIND.search(kind):
            return "mixer"
        if names.ATTENTION_KIND.search(kind):
            return "attn"
        if "Head" not in kind and names.FF_KIND.search(kind):
            return "ff"
    return "other"


def owners(paths: Iterable[str]) -> dict[str, str]:
    """The kind of a module by its parameters: `"attn"` (queries, keys, values) or `"mixer"`."""
    owned: dict[str, set[str]] = {}
    for path in paths:
        owner, _, last = path.rpartition(".")
        owned.setdefault(owner, set()).add(last)
    found = {}
    for owner, own in owned.items():
        said = {_projection(name) for name in own}
        if "receptance" in own:  # RWKV's recurrence has keys and values too
            found[owner] = "mixer"
        elif said & {"qkv", "kv"} or ("v" in said and said & {"q", "k"}):
            found[owner] = "attn"
    return found
