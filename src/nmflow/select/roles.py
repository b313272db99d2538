"""What a weight does in a network, told from its name: pure functions on strings and shapes.

Roles are `"q"`, `"k"`, `"v"`, `"o"` (attention's projections), `"qkv"` and `"kv"` (fused ones),
`"ff"` (the matrices of a feed-forward block), `"head"`, `"embedding"`, `"position"`, `"adapter"`,
`"pooler"` and `"other"`. Presets are sets of roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# What each preset takes. A fused projection whose rows can be told apart is cut into q, k and v
# before it is looked up here, so "qkv" and "kv" are only the ones that have to be taken whole.
PRESETS: dict[str, frozenset[str]] = {
    "ff": frozenset({"ff"}),
    "qk": frozenset({"q", "k"}),
    "qkv": frozenset({"q", "k", "v", "qkv", "kv"}),
    "attn": frozenset({"q", "k", "v", "qkv", "kv", "o"}),
    "all": frozenset({"q", "k", "v", "qkv", "kv", "o", "ff", "pooler", "other"}),
}

# Why the preset "all" passes a role by.
NOT_IN_ALL = {
    "head": "an output head: only a glob takes it",
    "embedding": "an embedding: only a glob takes it",
    "position": "a positional table: only a glob takes it",
    "adapter": "a low-rank adapter: the weight that the network multiplies with is another",
}

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")

_Q = {"q", "query", "q_proj", "q_lin", "q_attn", "query_proj", "to_q", "wq", "w_q", "w_qs",
      "linear_q", "q_proj_weight"}  # fmt: skip
_K = {"k", "key", "k_proj", "k_lin", "key_proj", "to_k", "wk", "w_k", "w_ks", "linear_k",
      "k_proj_weight"}  # fmt: skip
_V = {"v", "value", "v_proj", "v_lin", "value_proj", "to_v", "wv", "w_v", "w_vs", "linear_v",
      "v_proj_weight"}  # fmt: skip
_QKV = {"qkv", "in_proj_weight", "c_attn", "qkv_proj", "Wqkv", "to_qkv", "query_key_value"}
_KV = {"kv", "kv_proj", "to_kv"}
_O = {"o_proj", "out_lin", "to_out"}
_O_IN_ATTENTION = {"o", "out_proj", "proj", "c_proj", "dense", "wo", "w_o", "fc", "linear_out"}
# Per-head interleaving: by the name, or by the class of the owner where the name alone misleads.
_INTERLEAVED = {"query_key_value"}
_INTERLEAVED_OWNERS = ("CodeGen", "GPTBigCode")

_FF_PARENT = re.compile(
    r"mlp(_\w+)?|\w+_mlp|ffn?|\w+_ffn|(\w*_)?feed_?forward|densereludense|experts", re.IGNORECASE
)
_FF = {"fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "wi", "wi_0", "wi_1", "c_fc",
       "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
       "pwconv1", "pwconv2", "ffn", "ffn_output", "fc_in", "fc_out", "w_1", "w_2"}  # fmt: skip
_ROUTERS = {"gate", "router", "shared_expert_gate"}

_HEADS = {"classifier", "pre_classifier", "lm_head", "head", "heads", "score", "qa_outputs",
          "embed_out", "classification_head", "head_dist", "output_projection",
          "logits"}  # fmt: skip
# Names that mean a head only where the model itself holds them.
_TOP_HEADS = {"fc", "proj_out", "output", "out", "decoder", "cls", "generator"}
_POSITION = re.compile(
    r"embed_positions|positions?(al)?_(embed|enc|emb|bias)\w*|pos_?(embed|enc|emb|bias)\w*"
    r"|relative_\w*(bias|embed|table)\w*|rel_pos\w*|continuous_position_bias_mlp|cpb_mlp|wpe"
)
_EMBEDDING = {"embeddings", "embedding", "embedder", "patch_embed", "patch_embeddings",
              "patch_embedding", "conv_proj", "embed_tokens", "tok_embeddings", "embed_in", "wte",
              "word_embeddings", "shared", "embed", "emb"}  # fmt: skip


def clean(name: str) -> str:
    """The name without what wrappers (compile, checkpointing, DDP) put into it."""
    name = _WRAPPERS.sub(r"\1", "." + name).replace("..", ".").strip(".")
    return name.removeprefix("module.")


def is_attention(path: str) -> bool:
    """Whether one of the three nearest ancestors of a module says that it is attention."""
    near = path.split(".")[-4:-1]
    return any("attn" in part.lower() or "attention" in part.lower() for part in near)


def role_of(path: str, ndim: int = 2, attention: bool = False) -> str:
    """The role of the weight of the module at `path` (or of the parameter at `path`).

    Args:
        path: a module's path, such as `"layers.0.mlp.fc1"`, or, where a module owns several
            weights, a parameter's: `"layers.0.self_attn.in_proj_weight"`.
        ndim: dimensions of the weight: a convolution called `fc1` is no feed-forward matrix unless
            it sits in a module that says so.
        attention: whether the module's siblings are query, key or value projections.

    Example:
        >>> role_of("layer.0.attention.output.dense"), role_of("layer.0.output.dense")
        ('o', 'ff')
    """
    parts = [part for part in path.split(".") if part not in ("base_layer", "default")]
    named = [part for part in parts if not part.isdigit()] or [""]
    last = named[-1]
    if any(part.startswith("lora_") for part in parts):
        return "adapter"
    if any(part in _HEADS for part in named):
        return "head"
    if (last in _TOP_HEADS and len(parts) == 1) or parts[0] == "cls":
        return "head"
    if parts[0] == "generator" and len(parts) == 2:
        return "head"
    if any(_POSITION.fullmatch(part) for part in named):
        return "position"
    if any(part in _EMBEDDING for part in named):
        return "embedding"
    if "pooler" in named:
        return "pooler"
    if any(_FF_PARENT.fullmatch(part) for part in named):
        return "other" if last in _ROUTERS else "ff"
    for role, names in (("q", _Q), ("k", _K), ("v", _V), ("qkv", _QKV), ("kv", _KV), ("o", _O)):
        if last in names:
            return role
    near_attention = is_attention(path)
    if last in _O_IN_ATTENTION and (attention or near_attention):
        return "o"
    is_ff = last in _FF or named[-2:] in (["intermediate", "dense"], ["output", "dense"])
    if is_ff and ndim == 2 and not near_attention:
        return "ff"
    return "other"


def cut(path: str, role: str, out: int, length: int, owner: str = "") -> list[tuple[str, int, int]]:
    """Cut a weight's output rows into parts `(role, start, stop)`.

    Fused projections are cut into q, k and v where their rows lie one after the other and are of
    equal size (`out == 3 * in`, or `out == 2 * in` for key and value); interleaved ones, and those
    with fewer key than query heads, stay whole.

    Args:
        path: as in `role_of`.
        role: what `role_of` said.
        out: number of output rows.
        length: number of inputs.
        owner: class name of the module that owns the projection, for two families that interleave.
    """
    last = path.split(".")[-1]
    mixed = last in _INTERLEAVED or owner.startswith(_INTERLEAVED_OWNERS)
    if role in ("qkv", "kv") and not mixed:
        if role == "qkv" and out == 3 * length:
            return [(part, i * length, (i + 1) * length) for i, part in enumerate("qkv")]
        # GPT-2's cross attention calls its fused key and value c_attn too.
        if out == 2 * length and (role == "kv" or last == "c_attn"):
            return [(part, i * length, (i + 1) * length) for i, part in enumerate("kv")]
    return [(role, 0, out)]


def attention_owners(paths: Iterable[str]) -> set[str]:
    """The modules that own query, key or value projections: their other ones are outputs."""
    known = _Q | _K | _V | _QKV | _KV
    return {path.rpartition(".")[0] for path in paths if path.rpartition(".")[2] in known}
