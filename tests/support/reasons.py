"""Why a preset does not take a weight that its class names give to the role: rules, kept short.

Each rule is a model type, a preset and a weight's name, all as regular expressions that must match
in full, and the reason. The first that matches tells.
"""

from __future__ import annotations

import re

_HEAD = r"(.*\.)?(\w*_heads?|heads?|\w*bbox_\w+|class_embed|\w*predictor\w*|score|lm_head)\d*\..*"
RULES = (
    (".*", ".*", _HEAD, "layers of an output head"),
    (".*", "qk|qkv", r".*\.kv_(a_proj_with_mqa|b_proj)\.weight",
     "latent attention: its rows hold keys and values at once"),
    ("deepseek_v4", "qk", r".*\.kv_proj\.weight", "one matrix is both keys and values"),
    (".*", "qk", r".*\.query_key_value\.weight", "queries, keys and values interleave by head"),
    ("codegen|minimax|gpt_bigcode", "qk", r".*\.(qkv_proj|c_attn)\.weight",
     "queries, keys and values interleave"),
    ("ibert", ".*", r".*", "IBert's QuantLinear computes with a quantized weight"),
    ("bit|nfnet.*", "all", r".*", "its convolutions standardize their weights"),
    ("granite_speech.*", "ff|all", r".*encoder\.out(_mid)?\.weight", "a head, and its way back"),
    ("mobilebert", "ff", r".*\.output\.bottleneck\.dense\.weight", "a bottleneck between blocks"),
    ("pp_doclayout_v3", "ff", r".*\.encoder_mask_output\..*", "the output of a mask"),
    ("bridgetower", "attn", r".*\.mlp\.c_\w+\.weight", "feed-forward: in 'ff'"),
    ("UNet2D.*", ".*", r".*\.time_emb_proj\.weight", "embeds the time step"),
    ("iformer.*", "ff", r".*\.c\.weight", "a convolution of its mixer"),
    ("rwkv", ".*", r".*\.attention\.\w+\.weight", "a recurrence, which is a mixer: in 'all'"),
    ("gcvit.*", "qk", r".*\.qkv\.weight", "holds keys and values; queries are global"),
    ("efficientformer.*", "qk", r".*\.qkv\.weight", "its values are wider than its keys"),
    ("evolla", "qk", r".*\.to_kv\.weight", "its module does not tell the size of a head"),
    (".*", ".*", r".*(continuous_position_bias_mlp|cpb_mlp|relative_pos_embeddings)\..*",
     "makes positional biases"),
    (".*", ".*", r".*(\.rel_logits_proj\.proj|mm_input_projection_weight|_gate_weight"
     r"|\.mamba\.\w+_proj_weight|prompts_visual_projection)",
     "a parameter of a module that nmflow does not know"),
    ("jetmoe", "ff", r".*\.self_attention\.experts\..*", "experts of attention: in 'attn'"),
)  # fmt: skip


def reason(kind: str, preset: str, name: str) -> str:
    """The reason why `preset` leaves out `name` in a model of type `kind`, or nothing."""
    for kinds, presets, names, said in RULES:
        if (
            re.fullmatch(kinds, kind)
            and re.fullmatch(presets, preset)
            and re.fullmatch(names, name)
        ):
            return said
    return ""
