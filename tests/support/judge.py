"""What each weight of a model is for, judged by the class names around it alone.

This judgement shares no code and no table with `nmflow.select`, which reads the names of modules
first. A weight belongs to attention or to a feed-forward block if the nearest class around it that
says anything says so. Where none does, a pair of matrices that a layer holds itself, from narrow to
wide and back, is a feed-forward block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

_OUTSIDE = re.compile(
    r"router|topkgat|moegate(?!d)|^gate$|embed|positional|position(?!wise)|classif|pooler"
    r"|(?<!multi)heads?$|predict|lmhead|rotary"
)
_ATTENTION = re.compile(r"att(entio)?n|mha|msa$|selfoutput|retention")
_FEED_FORWARD = re.compile(
    r"mlp|feedforward|ffn|intermediate|output$|experts?|relu?dense|glu(?!e)|boom|ff$|moe$"
)
_SILENT = re.compile(
    r"(layer|block|merger|encoder|decoder|stage)(\d*d)?$|^(linear|conv[12]d|\w*list|sequential)$"
)
_Q = {"q", "query", "queries", "wq", "qs"}
_K = {"k", "key", "keys", "wk", "ks"}
_V = {"v", "value", "values", "wv", "vs"}
_QKV = {"qkv", "wqkv", "qkvs"}
_FUSED = {"c_attn", "in_proj_weight", "att_proj"}  # of GPT-2, torch and Bark


@dataclass(frozen=True)
class Judged:
    """A matrix of a model and what it is for.

    Attributes:
        name: the parameter's name.
        numel: how many weights.
        role: `"attn"`, `"ff"`, `"outside"` (embeddings, heads, routers, poolers), `"edge"` (what
            the model itself holds: its first or last projection) or `"other"`.
        part: of attention, `"q"`, `"k"`, `"v"`, `"qkv"`, `"kv"` or `"rest"`.
        kinds: the class names around it, the nearest first.
    """

    name: str
    numel: int
    role: str
    part: str
    kinds: tuple[str, ...]


def judge(model: nn.Module) -> list[Judged]:
    """Every matrix that a model multiplies with, tied ones once."""
    modules = dict(model.named_modules())
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    found = []
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        if not _multiplies(modules[path], own, parameter):
            continue
        kinds = []
        while True:
            kinds.append(type(modules[path]).__name__)
            if not path:
                break
            path = path.rpartition(".")[0]
        role = "outside" if id(parameter) in tables else _role(kinds, type(model).__name__)
        part = _part(name) if role == "attn" else ""
        found.append(Judged(name, math.prod(parameter.shape), role, part, tuple(kinds)))
    paired = _pairs(model, [x for x in found if x.role == "other"])
    return [replace(x, role="ff") if x.name in paired else x for x in found]


def _pairs(model: nn.Module, unsaid: list[Judged]) -> set[str]:
    """Matrices that a layer or block holds itself, from narrow to wide and back: BART's."""
    held: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for x in unsaid:
        parent = x.name.rpartition(".")[0].rpartition(".")[0]
        if x.kinds[0].endswith("Linear") and _SILENT.search(x.kinds[1].lower()):
            shape = tuple(model.get_parameter(x.name).shape)
            held.setdefault(parent, []).append((x.name, shape))
    found = set()
    for own in held.values():
        for i, (wide, (out, length)) in enumerate(own):
            back = [name for name, shape in own[i + 1 :] if shape == (length, out)]
            found |= {wide, *back} if out > length and back else set()
    return found


def _multiplies(module: nn.Module, own: str, parameter: nn.Parameter) -> bool:
    shape = tuple(parameter.shape)
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or type(module).__name__ == "Conv1D":
        return len(shape) == 2
    if isinstance(module, nn.modules.conv._ConvNd):
        return (
            own == "weight"
            and module.groups == 1
            and len(shape) > 2
            and all(x == 1 for x in shape[2:])
        )
    if isinstance(module, nn.Embedding | nn.RNNBase):
        return False
    # A module's own matrices: no vectors, tables of one row or biases.
    named = "proj" in own or "weight" in own or own in {"w1", "w2", "v1", "q", "k", "v", "o", "r"}
    return named and "bias" not in own and len(shape) in (2, 3) and min(shape) > 1


def _role(kinds: list[str], model: str) -> str:
    inner = False
    for kind in kinds:
        low = _without(kind, model).lower()
        if kind == model or re.search(r"For[A-Z]\w*$|Model$", kind):
            return "other" if inner else "edge"
        attention = max((m.end() for m in _ATTENTION.finditer(low)), default=0)
        feed_forward = max((m.end() for m in _FEED_FORWARD.finditer(low)), default=0)
        if re.search(r"att\w*output", low):
            return "attn"
        if _OUTSIDE.search(low) and not attention:
            return "outside"
        inner = inner or not re.fullmatch(r"\w*linear|conv[12]d|\w*list|sequential", low)
        if _SILENT.search(low) and not feed_forward:
            continue
        if attention or feed_forward:
            return "attn" if attention >= feed_forward else "ff"
    return "other"


def _without(kind: str, model: str) -> str:
    """A class name without the name of the model that it begins with."""
    base = re.sub(r"(For[A-Z]\w*|(Text|Vision|Audio|LMHead)?Model)$", "", model)
    return kind.removeprefix(base) or kind


def _part(name: str) -> str:
    parts = [x for x in name.split(".") if x != "weight" and not x.isdigit()]
    words = set(re.split(r"[_\W]", parts[-1].lower())) if parts else set()
    if (
        (parts and parts[-1] in _FUSED)
        or words & _QKV
        or (words & _Q and words & _K and words & _V)
    ):
        return "qkv"
    if "kv" in words or "wkv" in words or (words & _K and words & _V):
        return "kv"
    for part, said in (("q", _Q), ("k", _K), ("v", _V)):
        if words & said:
            return part
    return "rest"


@dataclass
class Share:
    """How much of a role a preset takes.

    Attributes:
        taken: weights of the role that it takes.
        total: weights of the role.
        missed: names of what it does not take.
    """

    taken: int
    total: int
    missed: list[str]


_WANTED: dict[str, Callable[[Judged], bool]] = {
    "ff": lambda x: x.role == "ff",
    "qk": lambda x: x.role == "attn" and x.part in ("q", "k", "qkv", "kv"),
    "qkv": lambda x: x.role == "attn" and x.part in ("q", "k", "v", "qkv", "kv"),
    "attn": lambda x: x.role == "attn",
    "all": lambda x: x.role not in ("outside", "edge"),
}


def shares(
    judged: list[Judged], taken: dict[str, set[str]]
) -> tuple[dict[str, Share], dict[str, list[str]]]:
    """The share of each preset, and what each takes beyond its role.

    Args:
        judged: what `judge` said.
        taken: names of the parameters that each preset takes, in whole or in part.
    """
    found, beyond = {}, {}
    for preset, wants in _WANTED.items():
        role = [x for x in judged if wants(x)]
        missed = [x.name for x in role if x.name not in taken[preset]]
        got = sum(x.numel for x in role if x.name in taken[preset])
        found[preset] = Share(got, sum(x.numel for x in role), missed)
        names = {x.name for x in judged if not wants(x) and x.role not in ("other", "edge")}
        beyond[preset] = sorted(names & taken[preset])
    return found, beyond


def count(model: nn.Module) -> int:
    """The weights of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters() if isinstance(p, torch.Tensor))
