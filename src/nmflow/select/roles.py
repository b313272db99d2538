"""What a weight does in a network, told from names and shapes: pure functions, and their tables.

Roles are `"q"`, `"k"`, `"v"`, `"o"` (attention's projections), `"qkv"` and `"kv"` (fused ones),
`"attn"` (what else attention multiplies with), `"ff"` (the matrices of a feed-forward block, also
of experts), `"mixer"` (state spaces and linear recurrences), `"router"`, `"stem"`, `"head"`,
`"embedding"`, `"position"`, `"adapter"`, `"pooler"` and `"other"`. Presets are sets of roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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

# Why the preset "all" passes a role by.
NOT_IN_ALL = {
    "head": "an output head: only a glob takes it",
    "embedding": "an embedding: only a glob takes it",
    "position": "a positional table: only a glob takes it",
    "adapter": "a low-rank adapter: the weight that the network multiplies with is another",
    "pooler": "a pooler: only a glob takes it",
    "router": "a router, which chooses experts: only a glob takes it",
    "stem": "a stem, which reads the raw input: only a glob takes it",
}

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")

# -- attention, by the last part of a path ------------------------------------------------------
_Q = {
    "q",
    "query",
    "q_proj",
    "q_lin",
    "q_attn",
    "query_proj",
    "to_q",
    "wq",
    "w_q",
    "w_qs",
    "linear_q",
    "q_proj_weight",
    "queries",
    "q_linear",
    "qlin",
    "q_a_proj",
    "q_b_proj",
    "wq_a",
    "wq_b",  # DeepSeek's latent attention
    "query_global",
    "add_q_proj",
    "to_add_q",  # Longformer; Flux and SD3
    "pos_query_proj",
    "pos_q_proj",
    "q_conv",
    "q_proj_conv",
}  # DeBERTa
_K = {"k", "key", "k_proj", "k_lin", "key_proj", "to_k", "wk", "w_k", "w_ks", "linear_k",
      "k_proj_weight", "keys", "k_linear",
      "key_global", "add_k_proj", "to_add_k", "to_k_ip",
      "pos_key_proj", "pos_proj", "r_kernel", "linear_pos", "relative_k_proj", "r", "r_net",
      "k_head", "r_head", "query_key"}  # fmt: skip
_V = {"v", "value", "v_proj", "v_lin", "value_proj", "to_v", "wv", "w_v", "w_vs", "linear_v",
      "v_proj_weight", "values", "v_linear", "value_global", "add_v_proj", "to_add_v", "to_v_ip",
      "v_head"}  # fmt: skip
_QKV = {"qkv", "in_proj_weight", "c_attn", "qkv_proj", "Wqkv", "to_qkv", "query_key_value",
        "qkv_net", "att_proj", "qkv_linear", "in_proj_qkv", "to_added_qkv", "to_qkvs",
        "qkv_conv"}  # fmt: skip
_KV = {"kv", "kv_proj", "to_kv", "kv_a_proj_with_mqa", "kv_b_proj", "wkv", "wkv_a", "wkv_b",
       "kv_a_proj", "to_added_kv", "Wkv", "kv_linear", "kv_down_proj", "kv_up_proj",
       "key_value", "c_kv"}  # fmt: skip
_O = {"o_proj", "out_lin", "to_out", "to_add_out", "o_net"}
_O_IN_ATTENTION = {"o", "out_proj", "proj", "c_proj", "dense", "wo", "Wo", "w_o", "fc", "out",
                   "linear_out", "projection", "output", "post_proj", "proj_out", "dense_global",
                   "o_a_proj", "o_b_proj", "wo_a", "wo_b", "output_projection",
                   "o_linear", "to_out_proj", "out_projection"}  # fmt: skip
# Rows of the heads are interleaved: by the name (GPT-NeoX, Bloom, Falcon, Persimmon), or by the
# class of the owner, where the name alone misleads.
_INTERLEAVED = {"query_key_value"}
_INTERLEAVED_OWNERS = ("CodeGen", "GPTBigCode", "MiniMax")

_ATTENTION_PART = re.compile(
    r".*(attn|attentions?|msa|mha)\d*(_(?!block|layer|stage)\w+)?|sa|ca", re.IGNORECASE
)
_ATTENTION_KIND = re.compile(r"(attention|attn|msa\b|mha)", re.IGNORECASE)

# -- feed-forward blocks ------------------------------------------------------------------------
_FF_PART = re.compile(
    r"mlp(s|_?\w+)?|\w+_mlp\d*|ffn?s?|\w+_ffn\w*|ffn_\w+|ff_\w+|(\w*_)?feed_?forward\w*|densereludense"
    r"|experts|shared_experts?|block_sparse_moe|\w*_moe|moe|glu_mlp|expert_mlp|conv_ffn",
    re.IGNORECASE,
)
_FF_KIND = re.compile(
    r"mlp|feed_?forward|ffn?(layer|block|\b)|ff$|experts?|glu|intermediate(?!s)", re.IGNORECASE
)
_FF = {"fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "wi", "wi_0", "wi_1", "c_fc",
       "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
       "pwconv1", "pwconv2", "ffn", "ffn_output", "fc_in", "fc_out", "w_1", "w_2",
       "ff_proj", "ff_out", "linear_1", "linear_2", "w12", "w3", "dense1", "dense2",
       "intermediate_dense", "output_dense", "ff1", "ff2"}  # fmt: skip
# Flux's single blocks fuse attention's output and the second feed-forward matrix into `proj_out`.
_FUSED_FF = {"proj_mlp", "linear_mlp"}

# -- what presets leave alone -------------------------------------------------------------------
_ROUTERS = {"router", "shared_expert_gate", "shared_experts_gate", "gating", "gate_network",
            "moe_gate", "router_proj", "route", "topk_router", "switch_gate"}  # fmt: skip
_ROUTER_KIND = re.compile(r"router|top_?k_?gat|moe_?gate|noisy_?gate|gating", re.IGNORECASE)
_MIXER_PART = re.compile(
    r"mamba\w*|ssm|mixer|linear_attn|linear_attention|time_mix\w*|rwkv|hyena|recurrent_block"
    r"|temporal_block|mlstm\w*|slstm\w*|delta_net|short_conv|conv_block|ssd"
)
_MIXER_KIND = re.compile(
    r"mamba|rwkv|ssm\b|deltanet|linearattention|lightningattention|gatedlinear|recurrentblock"
    r"|rglru|hyena|[ms]lstm|shortconv|retention|kimidelta",
    re.IGNORECASE,
)
_HEADS = {"classifier", "pre_classifier", "lm_head", "head", "heads", "score", "qa_outputs",
          "embed_out", "classification_head", "head_dist", "output_projection", "logits",
          "codebook_heads", "lm_heads", "audio_head", "text_head", "codec_head",
          "class_labels_classifier", "bbox_predictor", "class_predictor", "class_embed",
          "bbox_embed", "entity_classifier", "vocab_projector", "vocab_transform",
          "vocab_layer_norm", "generator_lm_head", "discriminator_predictions",
          "generator_predictions", "sop_classifier", "seq_relationship", "decode_head",
          "auxiliary_head", "prediction_head", "lm_prediction_head", "ctc_head", "depth_head",
          "mask_head", "decoder_pred", "text_projection", "visual_projection",
          "seg_head", "box_head", "class_head", "vocab_proj"}  # fmt: skip
_HEAD_PART = re.compile(
    r"(?!multi_?head|per_head|n(um)?_head)\w*(_heads?|classifiers?|_logits|_predictors?"
    r"|_predictions?)|cls_\w*predictor|predictions?"
)
# Names that mean a head only where the model itself holds them.
_TOP_HEADS = {"fc", "proj_out", "output", "out", "decoder", "cls", "generator", "last_linear",
              "projector", "final_layer", "out_proj", "fc_out", "predictor", "to_logits",
              "output_layer", "mlm_head", "fc_norm"}  # fmt: skip
_POSITION = re.compile(
    r"embed_positions?|positions?(al)?_(embed|enc|emb|bias)\w*|pos_?(embed|enc|emb|bias|conv)\w*"
    r"|relative_\w*(bias|embed|emb|table)\w*|rel_pos\w*|continuous_position_bias_mlp|cpb_mlp|wpe"
    r"|(absolute|abs)_pos\w*|rotary\w*|\w+_pos(ition)?_embed\w*|time_?stamp_embed\w*|r_emb|pos_net"
    r"|distance_embedding|embed_pos\w*|x_position_\w+|[hwy]_position_\w+"
)
_EMBEDDING = {"embeddings", "embedding", "embedder", "patch_embed", "patch_embeddings",
              "patch_embedding", "conv_proj", "embed_tokens", "tok_embeddings", "embed_in", "wte",
              "word_embeddings", "shared", "embed", "emb", "patch_embedder", "x_embedder",
              "context_embedder", "time_text_embed", "timestep_embedder", "time_embed",
              "text_embedder", "guidance_embedder", "time_embedding", "embed_patches",
              "class_embedding", "label_embed", "y_embedder", "t_embedder", "caption_projection",
              "patchifier", "to_patch_embedding", "patch_projection", "add_embedding",
              "time_proj", "time_emb_proj", "adaln_single", "embedding_hidden_mapping_in",
              "embeddings_project", "patch_emb", "embed_proj"}  # fmt: skip
_EMBEDDING_PART = re.compile(r"\w+_embedd(ing|er)s?|\w+_embeds?|(word|token|tok|patch|time)_emb")
_POOLERS = {"pooler", "pooled_projection", "pooling_layer", "attn_pool", "attention_pool",
            "attentional_pooler"}  # fmt: skip


def clean(name: str) -> str:
    """The name without what wrappers (compile, checkpointing, DDP) put into it."""
    name = _WRAPPERS.sub(r"\1", "." + name).replace("..", ".").strip(".")
    return name.removeprefix("module.")


def is_attention(path: str) -> bool:
    """Whether one of the three nearest ancestors of a module says that it is attention."""
    near = path.split(".")[-4:-1]
    return any("attn" in part.lower() or "attention" in part.lower() for part in near)


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
        beside: what `owners` says of the module around it.
        kinds: class names of the modules around it, the nearest first; they are asked where names
            do not tell.
        experts: how many experts there are, where a module around it says so.

    Example:
        >>> role_of("layer.0.attention.output.dense"), role_of("layer.0.output.dense")
        ('o', 'ff')
    """
    parts = [part for part in path.split(".") if part not in ("base_layer", "default")]
    named = [part for part in parts if not part.isdigit()] or [""]
    outside = _outside(parts, named, shape, kinds, experts, beside)
    return outside or _inside(named, shape, beside, kinds)


def _outside(
    parts: list[str],
    named: list[str],
    shape: Sequence[int],
    kinds: Sequence[str],
    experts: int,
    beside: str,
) -> str:
    """The role of what no preset prunes, or nothing."""
    last = named[-1]
    if any(part.startswith("lora_") for part in parts):
        return "adapter"
    if any(part in _ROUTERS for part in named) or _ROUTER_KIND.search(kinds[0] if kinds else ""):
        return "router"
    if last in ("gate", "wg", "classifier") and _is_router(named, shape, experts):
        return "router"
    if any(part in _HEADS or _HEAD_PART.fullmatch(part) for part in named):
        inner = last in _O_IN_ATTENTION and is_attention(".".join(named))
        if not inner and not _FF_PART.fullmatch(named[0]):
            return "head"
    if (last in _TOP_HEADS and len(parts) == 1 and not beside) or parts[0] == "cls":
        return "head"
    if parts[0] == "generator" and len(parts) == 2:
        return "head"
    if any(_POSITION.fullmatch(part) for part in named):
        return "position"
    if any(part in _EMBEDDING or _EMBEDDING_PART.fullmatch(part) for part in named):
        return "embedding"
    return "pooler" if any(part in _POOLERS for part in named) else ""


def _is_router(named: list[str], shape: Sequence[int], experts: int) -> bool:
    if len(shape) != 2:
        return False
    if experts:
        return shape[0] == experts
    # Without a number, a gate of a feed-forward block that narrows: a GLU's gate widens.
    return shape[0] < shape[1] and any(_FF_PART.fullmatch(part) for part in named[:-1])


def _inside(named: list[str], shape: Sequence[int], beside: str, kinds: Sequence[str]) -> str:
    """The role of what lies in a block, by its name, then by what is around it."""
    last, around = named[-1], _around(named[:-1])
    by_name = _projection(last)
    matrix = len(shape) == 2 or all(size == 1 for size in shape[2:])
    attention = beside == "attn"
    if around == "ff":
        return "ff"
    if beside == "mixer":
        return "mixer"
    if around == "mixer" and not attention:
        return "ff" if _by_kind(kinds[:1]) == "ff" else "mixer"  # NemotronH calls all of them so
    if by_name and (last != "r" or around == "attn"):
        return by_name
    if last in _O_IN_ATTENTION and (attention or around == "attn"):
        return "o"
    if around == "attn" or (attention and not _FF_PART.fullmatch(last)):
        return "attn" if matrix else "other"
    if _FF_PART.fullmatch(last) or last in _FUSED_FF:
        return "ff"
    ff = last in _FF or named[-2:] in (["intermediate", "dense"], ["output", "dense"])
    if ff and len(shape) == 2:
        return "ff"
    return _by_kind(kinds) if matrix else "other"


def _around(ancestors: list[str]) -> str:
    """What the nearest ancestor that says something says; experts serve attention as well."""
    found = ""
    for part in reversed(ancestors):
        if _MIXER_PART.fullmatch(part):
            return found or "mixer"
        if _FF_PART.fullmatch(part):
            if part not in ("experts", "moe"):
                return found or "ff"
            found = "ff"
        elif _ATTENTION_PART.fullmatch(part):
            return "attn"
    return found


def _projection(last: str) -> str:
    for role, names in (("q", _Q), ("k", _K), ("v", _V), ("qkv", _QKV), ("kv", _KV), ("o", _O)):
        if last in names:
            return role
    return ""


def _by_kind(kinds: Sequence[str]) -> str:
    for kind in kinds[:3]:
        if _MIXER_KIND.search(kind):
            return "mixer"
        if _ATTENTION_KIND.search(kind):
            return "attn"
        if _FF_KIND.search(kind):
            return "ff"
    return "other"


def cut(
    path: str,
    role: str,
    out: int,
    length: int,
    owner: str = "",
    heads: tuple[int, int, int] = (0, 0, 0),
) -> list[tuple[str, int, int]]:
    """Cut a weight's output rows into parts `(role, start, stop)`.

    Fused projections are cut into q, k and v where their rows lie one after the other: thirds
    (`out == 3 * in`, or `out == 2 * in` for key and value), or by the number of heads where the
    owner tells it. Interleaved ones stay whole.

    Args:
        path: as in `role_of`.
        role: what `role_of` said.
        out: number of output rows.
        length: number of inputs.
        owner: class name of the module that owns the projection, for families that interleave.
        heads: heads of queries, heads of keys and the size of one, as the owner says; 0 if not.
    """
    last = path.split(".")[-1]
    mixed = last in _INTERLEAVED or owner.startswith(_INTERLEAVED_OWNERS)
    if role in ("qkv", "kv") and not mixed:
        queries, keys, size = heads
        if role == "qkv" and keys and out == (queries + 2 * keys) * size:
            q, k = queries * size, keys * size
            return [("q", 0, q), ("k", q, q + k), ("v", q + k, out)]
        if role == "qkv" and out == 3 * length:
            return [(part, i * length, (i + 1) * length) for i, part in enumerate("qkv")]
        # GPT-2's cross attention calls its fused key and value c_attn too.
        if out == 2 * length and (role == "kv" or last == "c_attn"):
            return [(part, i * length, (i + 1) * length) for i, part in enumerate("kv")]
    return [(role, 0, out)]


def owners(paths: Iterable[str]) -> dict[str, str]:
    """What modules are by what they own: `"attn"` (queries, keys, values) or `"mixer"`."""
    owned: dict[str, set[str]] = {}
    for path in paths:
        owner, _, last = path.rpartition(".")
        owned.setdefault(owner, set()).add(last)
    found = {}
    for owner, names in owned.items():
        said = {_projection(name) for name in names}
        if "receptance" in names:  # RWKV's recurrence has keys and values too
            found[owner] = "mixer"
        elif said & {"qkv", "kv"} or len(said & {"q", "k", "v"}) > 1:
            found[owner] = "attn"
    return found
