"""Presets as sets of roles, and the reasons why `"all"` leaves some roles out."""

from __future__ import annotations

_ATTENTION = frozenset({"q", "k", "v", "qkv", "kv", "o", "attn"})
# What each preset takes. A fused projection whose rows can be told apart is cut into q, k and v
# before it is looked up here, so "qkv" and "kv" are only the ones that have to be taken whole.
PRESETS: dict[str, frozenset[str]] = {
    "ff": frozenset({"ff"}),
    "qk": frozenset({"q", "k"}),
    "qkv": frozenset({"q", "k", "v", "qkv", "kv"}),
    "attn": _ATTENTION,
    "all": _ATTENTION | {"ff", "mixer", "other"},
}

# Why the preset "all" leaves a role out.
NOT_IN_ALL = {
    "head": "an output head: only a glob takes it",
    "embedding": "an embedding: only a glob takes it",
    "position": "a positional table: only a glob takes it",
    "adapter": "a low-rank adapter: the weight that the network multiplies with is another",
    "pooler": "a pooler: only a glob takes it",
    "router": "a router, which chooses experts: only a glob takes it",
    "stem": "a stem, which reads the raw input: only a glob takes it",
}
