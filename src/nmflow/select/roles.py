"""What a weight does in a network, told from names and shapes: pure functions, and their tables.

Roles are `"q"`, `"k"`, `"v"`, `"o"` (attention's projections), `"qkv"` and `"kv"` (fused ones),
`"attn"` (what else attention multiplies with), `"ff"` (the matrices of a feed-forward block, also
of experts), `"mixer"` (state spaces and linear recurrences), `"router"`, `"stem"`, `"head"`,
`"embedding"`, `"position"`, `"adapter"`, `"pooler"` and `"other"`. Presets are sets of roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nmflow.select.presets import NOT_IN_ALL

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
    "q_a_proj",
    "q_b_proj",  # DeepSeek's latent attention
    "query_global",
    "add_q_proj",
    "pos_query_proj",
    "q_head",
}  # Longformer; Flux; DeBERTa; Funnel
_K = {
    "k",
    "key",
    "k_proj",
    "k_lin",
    "key_proj",
    "to_k",
    "wk",
    "w_k",
    "w_ks",
    "linear_k",
    "k_proj_weight",
    "key_global",
    "add_k_proj",
    "to_k_ip",
    "pos_key_proj",
    "k_head",
    "pos_proj",
    "linear_pos",
    "r_kernel",
    "r",
}  # keys of positions: DeBERTa, Conformer, XLNet
_V = {"v", "value", "v_proj", "v_lin", "value_proj", "to_v", "wv", "w_v", "w_vs", "linear_v",
      "v_proj_weight", "value_global", "add_v_proj", "to_v_ip", "v_head"}  # fmt: skip
_QKV = {"qkv", "in_proj_weight", "c_attn", "qkv_proj", "Wqkv", "to_qkv", "query_key_value",
        "att_proj", "qkv_net"}  # fmt: skip
_KV = {"kv", "kv_proj", "to_kv", "Wkv", "kv_a_proj_with_mqa", "kv_b_proj"}
_O = {"o_proj", "out_lin", "to_out", "to_add_out"}
_O_IN_ATTENTION = {"o", "out_proj", "proj", "c_proj", "dense", "wo", "Wo", "w_o", "fc", "out",
                   "linear_out", "projection", "output", "proj_out", "o_net", "output_proj",
                   "output_projection", "o_a_proj", "o_b_proj"}  # fmt: skip
# Inside attention these words tell, however a name goes on: `q_content_proj`, `projection_key`.
_WORDS = (
    ("qkv", {"qkv", "wqkv"}), ("kv", {"kv", "wkv"}), ("q", {"q", "query", "queries", "wq"}),
    ("k", {"k", "key", "keys", "wk"}), ("v", {"v", "value", "values", "wv"}),
)  # fmt: skip
_ATTENTION_PART = re.compile(
    r".*(attn|attentions?|msa|mha)\d*(_(?!block|layer|stage)\w+)?|(.*_)?att|sa|ca", re.IGNORECASE
)
_ATTENTION_KIND = re.compile(r"attention|attn|msa\b|mha", re.IGNORECASE)

# -- feed-forward blocks ------------------------------------------------------------------------
_FF_PART = re.compile(
    r"(?!\w*(mixer|encoder|decoder|model|head))"
    r"(mlps?|mlp_?\w+|\w+_mlp\d*|ffn?s?|\w+_ffn\w*|ffn_\w+|ff_\w+|(\w*_)?feed_?forward\w*"
    r"|densereludense|shared_experts?|block_sparse_moe|\w*_moe)",
    re.IGNORECASE,
)
_EXPERTS = {"experts", "moe"}  # of attention too, in JetMoE
_FF_KIND = re.compile(
    r"mlp|feed_?forward|ffn?(layer|block|\b)|ff$|experts?|glu(?!e)", re.IGNORECASE
)
_FF_DENSE = re.compile(r"(\w+_)?(intermediate|inter|output)(_\w+)?")  # BERT's, Q-Former's, LXMERT's
_FF = {"fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "wi", "wi_0", "wi_1", "c_fc",
       "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
       "pwconv1", "pwconv2", "ffn", "ffn_output", "fc_in", "fc_out", "w_1", "w_2",
       "pointwise_conv1", "pointwise_conv2",
       "ff_proj", "ff_out", "linear_1", "linear_2", "w12", "w3", "dense1", "dense2",
       "proj_mlp", "linear_mlp", "ff1", "ff2"}  # fmt: skip

# -- what presets leave alone -------------------------------------------------------------------
_ROUTERS = {"router", "shared_expert_gate", "shared_experts_gate", "gating", "gate_network",
            "moe_gate", "router_proj", "route", "topk_router", "switch_gate"}  # fmt: skip
_ROUTER_PART = re.compile(r"router_\w+|\w+_router")
_ROUTER_KIND = re.compile(r"router|top_?k_?gat|moe_?gate(?!d)", re.IGNORECASE)
_MIXER_PART = re.compile(
    r"mamba\w*|ssm|mixer|linear_attn|linear_attention|time_mix\w*|rwkv|hyena|recurrent_block"
    r"|temporal_block|mlstm\w*|slstm\w*|delta_net|short_conv|conv_block|ssd"
)
_MIXERS = {"mixer", "temporal_block", "conv_block"}  # of attention too: NemotronH, RecurrentGemma
_MIXER_KIND = re.compile(
    r"mamba|rwkv|ssm\b|deltanet|recurrentblock|rglru|hyena|[ms]lstm|shortconv|kimidelta",
    re.IGNORECASE,
)
_HEADS = {
    "classifier",
    "pre_classifier",
    "lm_head",
    "head",
    "heads",
    "score",
    "qa_outputs",
    "embed_out",
    "classification_head",
    "head_dist",
    "logits",
    "logits_dense",
    "class_embed",
    "bbox_embed",
    "decoder_pred",
    "predict_return",
    "splinter_qass",
    "vocab_projector",
    "vocab_transform",  # DistilBERT's
    "seq_relationship",
    "text_projection",
    "visual_projection",
}  # BERT's; CLIP's
_HEAD_PART = re.compile(
    r"(?!multi_?head|per_head|n(um)?_head|pre_logits)\w*(_heads?\d*|classifiers?|_logits|_predictors?"
    r"|_predictions?)|predictions?"
)
# Names that mean a head only where the model itself holds them.
_TOP_HEADS = {"fc", "proj_out", "output", "out", "decoder", "cls", "generator", "last_linear",
              "final_layer", "out_proj", "fc_out", "to_logits", "output_layer",
              "output_projection"}  # fmt: skip
_POSITION = re.compile(
    r"embed_positions?|positions?(al)?_(embed|enc|emb|bias)\w*|pos_?(embed|enc|emb|bias|conv)\w*"
    r"|relative_\w*(bias|embed|emb|table)\w*|rel_pos\w*|continuous_position_bias_mlp|cpb_mlp|wpe"
    r"|(absolute|abs)_pos\w*|rotary\w*|\w+_pos(ition)?_embed\w*|time_?stamp_embed\w*|r_emb|pos_net"
    r"|distance_embedding|embed_pos\w*|[xywh]_position_\w+|rel_bias\w*"
)
_EMBEDDING = {"embeddings", "embedding", "embedder", "patch_embed", "patch_embeddings",
              "patch_embedding", "conv_proj", "embed_tokens", "tok_embeddings", "embed_in", "wte",
              "word_embeddings", "shared", "embed", "emb", "patch_embedder", "x_embedder",
              "context_embedder", "time_text_embed", "timestep_embedder", "time_embed",
              "text_embedder", "guidance_embedder", "time_embedding", "embed_patches",
              "class_embedding", "label_embed", "y_embedder", "t_embedder", "caption_projection",
              "patchifier", "to_patch_embedding", "patch_projection", "add_embedding",
              "time_proj", "time_emb_proj", "time_step_proj", "adaln_single", "patch_emb",
              "embedding_hidden_mapping_in",
              "embeddings_project", "embed_proj"}  # fmt: skip
_EMBEDDING_PART = re.compile(
    r"\w+_embedd(ing|er)s?|\w+_embeds?|embed_\w+|(word|token|tok|patch|time)_emb"
)
_TRUNK = re.compile(r"(\w+_)?(encoders?|backbone|tower|model|transformer|trunk)")
_POOLER = re.compile(r"(\w+_)?pooler|pooled_projection")


def clean(name: str) -> str:
    """The name without what wrappers (compile, checkpointing, DDP) put into it."""
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
    if not beside and (parts[0] == "cls" or (last in _TOP_HEADS and len(parts) == 1)):
        return "head"
    if parts[0] == "generator" and len(parts) == 2:
        return "head"
    if around == "ff":
        return "ff"
    if beside == "mixer" or around == "linear":
        return "mixer"
    if around == "mixer" and not attention:  # NemotronH calls all of its blocks so
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
    if _FF_PART.fullmatch(last) or last in _EXPERTS:
        return "ff"
    ff = last in _FF or (last in ("dense", "conv1", "conv2") and _dense(named)) or last == "ffn"
    kind = _by_kind(kinds)
    if near or (attention and not ff) or (kind == "attn" and not ff):
        words = set(re.split(r"_", last.lower()))
        said = next((role for role, telling in _WORDS if words & telling), "")
        return said or ("o" if last in _O_IN_ATTENTION else "attn")
    return "ff" if ff and (len(shape) == 2 or last.startswith("conv")) else kind


def _dense(named: list[str]) -> bool:
    return len(named) > 1 and bool(_FF_DENSE.fullmatch(named[-2]))


def _routes(named: list[str], shape: Sequence[int], kinds: Sequence[str], experts: int) -> bool:
    said = any(part in _ROUTERS or _ROUTER_PART.fullmatch(part) for part in named)
    if said or any(_ROUTER_KIND.search(kind) for kind in kinds[:3]):
        return True
    last = named[-1] if named[-1] not in ("wg", "classifier") else "gate"
    if last != "gate" or len(shape) != 2 or "experts" in named[:-1]:
        return False
    if experts:
        return shape[0] == experts
    # Without a number, a gate of a feed-forward block that narrows: a GLU's gate widens.
    inside = any(_FF_PART.fullmatch(part) or part in _EXPERTS for part in named[:-1])
    return shape[0] < shape[1] and inside


def _outside(part: str) -> str:
    """What a name says of weights that no preset prunes, or nothing."""
    if _projection(part):
        return ""
    if _POSITION.fullmatch(part):
        return "position"
    if part in _HEADS or _HEAD_PART.fullmatch(part):
        return "head"
    if part in _EMBEDDING or _EMBEDDING_PART.fullmatch(part):
        return "embedding"
    return "pooler" if _POOLER.fullmatch(part) else ""


def _around(ancestors: list[str]) -> str:
    """What the nearest ancestor that says something says; `"linear"` for linear attention."""
    found = ""
    for part in reversed(ancestors):
        said = _outside(part)
        if _TRUNK.fullmatch(part):  # an embedding or a head may hold a whole network
            return found
        if part in _EXPERTS:
            found = "ff"
        elif said:
            return found or said
        elif _MIXER_PART.fullmatch(part):
            return found or ("mixer" if part in _MIXERS else "linear")
        elif _FF_PART.fullmatch(part):
            return "ff"
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
        if "Head" not in kind and _FF_KIND.search(kind):
            return "ff"
    return "other"


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
        elif said & {"qkv", "kv"} or ("v" in said and said & {"q", "k"}):
            found[owner] = "attn"
    return found
