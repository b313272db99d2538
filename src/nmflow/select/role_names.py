"""What networks call their parts: the names, words and classes that tell a weight's role."""

from __future__ import annotations

import re

# -- attention, by the last part of a path ------------------------------------------------------
Q = {
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
K = {
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
V = {"v", "value", "v_proj", "v_lin", "value_proj", "to_v", "wv", "w_v", "w_vs", "linear_v",
      "v_proj_weight", "value_global", "add_v_proj", "to_v_ip", "v_head"}  # fmt: skip
QKV = {"qkv", "in_proj_weight", "c_attn", "qkv_proj", "Wqkv", "to_qkv", "query_key_value",
        "att_proj", "qkv_net"}  # fmt: skip
KV = {"kv", "kv_proj", "to_kv", "Wkv", "kv_a_proj_with_mqa", "kv_b_proj"}
OUT = {"o_proj", "out_lin", "to_out", "to_add_out"}
PROJECTIONS = {"q": Q, "k": K, "v": V, "qkv": QKV, "kv": KV, "o": OUT}
OUT_IN_ATTENTION = {"o", "out_proj", "proj", "c_proj", "dense", "wo", "Wo", "w_o", "fc", "out",
                   "linear_out", "projection", "output", "proj_out", "o_net", "output_proj",
                   "output_projection", "o_a_proj", "o_b_proj"}  # fmt: skip
# Inside attention these words decide, such as in `q_content_proj` and `projection_key`.
WORDS = (
    ("qkv", {"qkv", "wqkv"}), ("kv", {"kv", "wkv"}), ("q", {"q", "query", "queries", "wq"}),
    ("k", {"k", "key", "keys", "wk"}), ("v", {"v", "value", "values", "wv"}),
)  # fmt: skip
ATTENTION_PART = re.compile(
    r".*(attn|attentions?|msa|mha)\d*(_(?!block|layer|stage)\w+)?|(.*_)?att|sa|ca", re.IGNORECASE
)
ATTENTION_KIND = re.compile(r"attention|attn|msa\b|mha", re.IGNORECASE)

# -- feed-forward blocks ------------------------------------------------------------------------
FF_PART = re.compile(
    r"(?!\w*(mixer|encoder|decoder|model|head))"
    r"(mlps?|mlp_?\w+|\w+_mlp\d*|ffn?s?|\w+_ffn\w*|ffn_\w+|ff_\w+|(\w*_)?feed_?forward\w*"
    r"|densereludense|shared_experts?|block_sparse_moe|\w*_moe)",
    re.IGNORECASE,
)
EXPERTS = {"experts", "moe"}  # of attention too, in JetMoE
FF_KIND = re.compile(r"mlp|feed_?forward|ffn?(layer|block|\b)|ff$|experts?|glu(?!e)", re.IGNORECASE)
FF_DENSE = re.compile(r"(\w+_)?(intermediate|inter|output)(_\w+)?")  # BERT's, Q-Former's, LXMERT's
FF = {"fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "wi", "wi_0", "wi_1", "c_fc",
       "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
       "pwconv1", "pwconv2", "ffn", "ffn_output", "fc_in", "fc_out", "w_1", "w_2",
       "pointwise_conv1", "pointwise_conv2",
       "ff_proj", "ff_out", "linear_1", "linear_2", "w12", "w3", "dense1", "dense2",
       "proj_mlp", "linear_mlp", "ff1", "ff2"}  # fmt: skip

# -- what presets leave alone -------------------------------------------------------------------
ROUTERS = {"router", "shared_expert_gate", "shared_experts_gate", "gating", "gate_network",
            "moe_gate", "router_proj", "route", "topk_router", "switch_gate"}  # fmt: skip
ROUTER_PART = re.compile(r"router_\w+|\w+_router")
ROUTER_KIND = re.compile(r"router|top_?k_?gat|moe_?gate(?!d)", re.IGNORECASE)
MIXER_PART = re.compile(
    r"mamba\w*|ssm|mixer|linear_attn|linear_attention|time_mix\w*|rwkv|hyena|recurrent_block"
    r"|temporal_block|mlstm\w*|slstm\w*|delta_net|short_conv|conv_block|ssd"
)
MIXERS = {"mixer", "temporal_block", "conv_block"}  # of attention too: NemotronH, RecurrentGemma
MIXER_KIND = re.compile(
    r"mamba|rwkv|ssm\b|deltanet|recurrentblock|rglru|hyena|[ms]lstm|shortconv|kimidelta",
    re.IGNORECASE,
)
HEADS = {
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
HEAD_PART = re.compile(
    r"(?!multi_?head|per_head|n(um)?_head|pre_logits)\w*(_heads?\d*|classifiers?|_logits|_predictors?"
    r"|_predictions?)|predictions?"
)
# Names that mean a head only where the model itself holds them.
TOP_HEADS = {"fc", "proj_out", "output", "out", "decoder", "cls", "generator", "last_linear",
              "final_layer", "out_proj", "fc_out", "to_logits", "output_layer",
              "output_projection"}  # fmt: skip
POSITION = re.compile(
    r"embed_positions?|positions?(al)?_(embed|enc|emb|bias)\w*|pos_?(embed|enc|emb|bias|conv)\w*"
    r"|relative_\w*(bias|embed|emb|table)\w*|rel_pos\w*|continuous_position_bias_mlp|cpb_mlp|wpe"
    r"|(absolute|abs)_pos\w*|rotary\w*|\w+_pos(ition)?_embed\w*|time_?stamp_embed\w*|r_emb|pos_net"
    r"|distance_embedding|embed_pos\w*|[xywh]_position_\w+|rel_bias\w*"
)
EMBEDDING = {"embeddings", "embedding", "embedder", "patch_embed", "patch_embeddings",
              "patch_embedding", "conv_proj", "embed_tokens", "tok_embeddings", "embed_in", "wte",
              "word_embeddings", "shared", "embed", "emb", "patch_embedder", "x_embedder",
              "context_embedder", "time_text_embed", "timestep_embedder", "time_embed",
              "text_embedder", "guidance_embedder", "time_embedding", "embed_patches",
              "class_embedding", "label_embed", "y_embedder", "t_embedder", "caption_projection",
              "patchifier", "to_patch_embedding", "patch_projection", "add_embedding",
              "time_proj", "time_emb_proj", "time_step_proj", "adaln_single", "patch_emb",
              "embedding_hidden_mapping_in",
              "embeddings_project", "embed_proj"}  # fmt: skip
EMBEDDING_PART = re.compile(
    r"\w+_embedd(ing|er)s?|\w+_embeds?|embed_\w+|(word|token|tok|patch|time)_emb"
)
TRUNK = re.compile(r"(\w+_)?(encoders?|backbone|tower|model|transformer|trunk)")
POOLER = re.compile(r"(\w+_)?pooler|pooled_projection")
