"""Which weights a plan takes: presets on real architectures, axes, slices, and what is refused."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

import nmflow.select.plan
import nmflow.select.roles
import nmflow.text_table
from nmflow.errors import NMFlowWarning, PatternError, PlanError
from nmflow.pattern import Pattern
from nmflow.select.plan import Target, plan
from nmflow.select.states import layers_of_state
from nmflow.select.weights import layers_of

transformers = pytest.importorskip("transformers")
BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def vit():
    config = transformers.ViTConfig(**BLOCK, intermediate_size=64, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


def swinv2():
    config = transformers.Swinv2Config(
        image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.Swinv2ForImageClassification(config)


def t5(feed_forward="relu"):
    config = transformers.T5Config(
        vocab_size=48, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj=feed_forward,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def t5_gated():
    return t5("gated-gelu")


def bert():
    config = transformers.BertConfig(**BLOCK, intermediate_size=64, vocab_size=48)
    return transformers.BertForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=48, dim=32, n_layers=2, n_heads=2, hidden_dim=64
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(**more):
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **more
    )
    return transformers.GPT2LMHeadModel(config)


GPT2 = gpt2()


def marian():
    config = transformers.MarianConfig(
        vocab_size=48, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0,
        eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=0,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def llama():
    config = transformers.LlamaConfig(
        **BLOCK, intermediate_size=64, vocab_size=48, num_key_value_heads=1
    )
    return transformers.LlamaForCausalLM(config)


def torch_transformer():
    return nn.Transformer(32, 2, 2, 2, 64, batch_first=True)


class TimmBlock(nn.Module):
    """The names of timm's blocks; only the names and the shapes matter here."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(32, 96)
        self.attn.proj = nn.Linear(32, 32)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(32, 64)
        self.mlp.fc2 = nn.Linear(64, 32)


class Timm(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 32, 8, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 32))
        self.blocks = nn.ModuleList([TimmBlock(), TimmBlock()])
        self.head = nn.Linear(32, 10)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 32, 4, 4)
        block = nn.Module()
        block.mlp_tokens, block.mlp_channels = nn.Module(), nn.Module()
        for mlp, width in ((block.mlp_tokens, 16), (block.mlp_channels, 32)):
            mlp.fc1, mlp.fc2 = nn.Linear(width, 64), nn.Linear(64, width)
        self.blocks = nn.ModuleList([block])
        self.head = nn.Linear(32, 10)


def labels(model, include, pattern="1:4", **more):
    return {target.label for target in plan(model, pattern, include, **more)}


def under(prefixes, leaves):
    return {f"{prefix}{leaf}.weight" for prefix in prefixes for leaf in leaves}


def expectations():
    """(model, ff, q and k, v, o): written out by hand from the architectures."""
    two = range(2)
    if "vit.layers.0.mlp.fc1.weight" in dict(vit().named_parameters()):
        layers = [f"vit.layers.{i}." for i in two]
        att = [f"{p}attention." for p in layers]
        leaves = ["mlp.fc1", "mlp.fc2"], ["q_proj", "k_proj"], ["v_proj"], ["o_proj"]
    else:  # transformers before 5
        layers = [f"vit.encoder.layer.{i}." for i in two]
        att = [f"{p}attention." for p in layers]
        leaves = (["intermediate.dense", "output.dense"], ["attention.query", "attention.key"],
                  ["attention.value"], ["output.dense"])  # fmt: skip
    ff, qk, v, o = leaves
    yield vit, under(layers, ff), under(att, qk), under(att, v), under(att, o)
    stages = [f"swinv2.encoder.layers.{i}.blocks.0." for i in two]
    yield (swinv2, under(stages, ["intermediate.dense", "output.dense"]),
           under(stages, ["attention.self.query", "attention.self.key"]),
           under(stages, ["attention.self.value"]),
           under(stages, ["attention.output.dense"]))  # fmt: skip
    t5_att = [f"encoder.block.{i}.layer.0.SelfAttention." for i in two]
    t5_att += [f"decoder.block.{i}.layer.0.SelfAttention." for i in two]
    t5_att += [f"decoder.block.{i}.layer.1.EncDecAttention." for i in two]
    t5_ff = [f"encoder.block.{i}.layer.1.DenseReluDense." for i in two]
    t5_ff += [f"decoder.block.{i}.layer.2.DenseReluDense." for i in two]
    for build, leaves in ((t5, ["wi", "wo"]), (t5_gated, ["wi_0", "wi_1", "wo"])):
        yield (build, under(t5_ff, leaves), under(t5_att, ["q", "k"]), under(t5_att, ["v"]),
               under(t5_att, ["o"]))  # fmt: skip
    layers = [f"bert.encoder.layer.{i}." for i in two]
    yield (bert, under(layers, ["intermediate.dense", "output.dense"]),
           under(layers, ["attention.self.query", "attention.self.key"]),
           under(layers, ["attention.self.value"]),
           under(layers, ["attention.output.dense"]))  # fmt: skip
    layers = [f"distilbert.transformer.layer.{i}." for i in two]
    att = [f"{p}attention." for p in layers]
    yield (distilbert, under(layers, ["ffn.lin1", "ffn.lin2"]), under(att, ["q_lin", "k_lin"]),
           under(att, ["v_lin"]), under(att, ["out_lin"]))  # fmt: skip
    layers = [f"model.{side}.layers.{i}." for side in ("encoder", "decoder") for i in two]
    att = [f"{p}self_attn." for p in layers] + [f"{p}encoder_attn." for p in layers[2:]]
    yield (marian, under(layers, ["fc1", "fc2"]), under(att, ["q_proj", "k_proj"]),
           under(att, ["v_proj"]), under(att, ["out_proj"]))  # fmt: skip
    layers = [f"model.layers.{i}." for i in two]
    att = [f"{p}self_attn." for p in layers]
    yield (llama, under(layers, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
           under(att, ["q_proj", "k_proj"]), under(att, ["v_proj"]),
           under(att, ["o_proj"]))  # fmt: skip
    layers = [f"transformer.h.{i}." for i in two]
    fused = [f"{p}attn.c_attn.weight" for p in layers]
    yield (gpt2, under(layers, ["mlp.c_fc", "mlp.c_proj"]), {f"{n}[0:64]" for n in fused},
           {f"{n}[64:96]" for n in fused}, under(layers, ["attn.c_proj"]))  # fmt: skip
    layers = [f"{side}.layers.{i}." for side in ("encoder", "decoder") for i in two]
    att = [f"{p}self_attn." for p in layers] + [f"{p}multihead_attn." for p in layers[2:]]
    yield (torch_transformer, under(layers, ["linear1", "linear2"]),
           {f"{p}in_proj_weight[0:64]" for p in att}, {f"{p}in_proj_weight[64:96]" for p in att},
           under(att, ["out_proj"]))  # fmt: skip
    layers = [f"blocks.{i}." for i in two]
    timm = under(layers, ["mlp.fc1", "mlp.fc2"])
    yield (Timm, timm,
           {f"{p}attn.qkv.weight[0:64]" for p in layers},
           {f"{p}attn.qkv.weight[64:96]" for p in layers},
           under(layers, ["attn.proj"]))  # fmt: skip


def whole(names):
    """Fused rows that are taken together are one target without rows."""
    return {name.partition("[")[0] for name in names}


@pytest.mark.parametrize("case", list(expectations()), ids=lambda c: c[0].__name__)
def test_presets_take_exactly_the_matrices_of_their_role(case):
    build, ff, qk, v, o = case
    model = build()
    assert labels(model, "ff") == ff
    assert labels(model, "qk") == qk
    assert labels(model, "qkv") == whole(qk | v)
    assert labels(model, "attn") == whole(qk | v | o)
    assert labels(model, ["ff", "qk"]) == ff | qk
    rest = labels(model, "all", exclude=["ff", "attn"]) if build is swinv2 else set()
    assert labels(model, "all") == whole(ff | qk | v | o) | rest
    if build is swinv2:
        assert rest == {"swinv2.encoder.layers.0.downsample.reduction.weight"}


@pytest.mark.parametrize("build", [vit, swinv2, t5, bert, gpt2, torch_transformer, llama])
def test_a_plan_and_its_left_out_cover_every_weight_of_two_dimensions(build):
    model = build()
    made = plan(model, "1:4", ["ff", "qk"])
    told = {t.name for t in made} | {name.partition("[")[0] for name, _ in made.left_out}
    assert told == {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert all(reason for _, reason in made.left_out)


def test_gpt2_is_grouped_along_its_stored_inputs_and_its_cross_attention_is_cut_in_two():
    made = {t.label: t for t in plan(gpt2(add_cross_attention=True), "1:4", "qk")}
    target = made["transformer.h.0.attn.c_attn.weight[0:64]"]
    assert target == Target(
        "transformer.h.0.attn.c_attn.weight", (32, 96), 0, Pattern("1:4"), (0, 64)
    )
    assert target.length == 32
    assert target.numel == 32 * 64
    assert made["transformer.h.0.crossattention.c_attn.weight[0:32]"].dim == 0
    assert "transformer.h.0.crossattention.q_attn.weight" in made


def test_resnet_takes_its_convolutions_and_neither_stem_nor_head():
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])
    model = transformers.ResNetForImageClassification(config)
    made = plan(model, "1:4")
    assert {t.name for t in made} == {
        n for n, p in model.named_parameters() if p.ndim == 4 and "embedder" not in n
    }
    assert all(t.dim == 1 for t in made)


def test_interleaved_projections_are_taken_whole_or_not_at_all():
    config = transformers.GPTNeoXConfig(**BLOCK, intermediate_size=64, vocab_size=48)
    model = transformers.GPTNeoXForCausalLM(config)
    fused = {f"gpt_neox.layers.{i}.attention.query_key_value.weight" for i in range(2)}
    assert labels(model, "qkv") == fused
    both = nn.ModuleDict({"neox": model, "timm": TimmBlock()})
    with pytest.warns(NMFlowWarning, match=r"'qk' leaves out 75.0%.*interleaved.*exclude"):
        made = plan(both, "1:4", "qk")
    assert "warning: 'qk' leaves out" in str(made)
    assert labels(both, "qk", exclude="*query_key_value*") == {"timm.attn.qkv.weight[0:64]"}
    assert [t.label for t in made] == ["timm.attn.qkv.weight[0:64]"]
    reasons = dict(made.left_out)
    assert all("interleaved" in reasons[f"neox.{name}"] for name in fused)
    with pytest.raises(PlanError, match=r"'qk' takes nothing.*query_key_value.*'attn'"):
        plan(model, "1:4", "qk")


def test_a_fused_projection_can_have_two_patterns():
    model = TimmBlock()
    made = plan(model, {"qk": "1:4", "attn": "2:4", "*.mlp.fc1.*": "1:8@4"})
    assert [(t.label, str(t.pattern), t.rows) for t in made] == [
        ("attn.qkv.weight[0:64]", "1:4", (0, 64)),
        ("attn.qkv.weight[64:96]", "2:4", (64, 96)),
        ("attn.proj.weight", "2:4", None),
        ("mlp.fc1.weight", "1:8@4", None),
    ]
    assert [t.label for t in plan(model, "1:4", "qkv", exclude="qk")] == ["attn.qkv.weight[64:96]"]


AXES = [
    (nn.Linear(8, 6), {"weight": 1}),
    (nn.Conv1d(8, 6, 3), {"weight": 1}),
    (nn.Conv2d(8, 6, 3, groups=2), {"weight": 1}),
    (nn.Conv3d(8, 6, 3), {"weight": 1}),
    (nn.ConvTranspose2d(8, 6, 3), {"weight": 0}),
    (nn.MultiheadAttention(8, 2), {"in_proj_weight": 1, "out_proj.weight": 1}),
    (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=12),
        {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1, "out_proj.weight": 1},
    ),
    (nn.GRU(4, 8), {"weight_ih_l0": 1, "weight_hh_l0": 1}),
    (nn.RNN(4, 8), {"weight_ih_l0": 1, "weight_hh_l0": 1}),
    (nn.LSTMCell(4, 8), {"weight_ih": 1, "weight_hh": 1}),
    (
        nn.LSTM(4, 8, num_layers=2, proj_size=4, bidirectional=True),
        {
            f"weight_{kind}_l{i}{way}": 1
            for kind in ("ih", "hh", "hr")
            for i in range(2)
            for way in ("", "_reverse")
        },
    ),
]


@pytest.mark.parametrize(("module", "axes"), AXES, ids=lambda x: type(x).__name__)
def test_every_module_family_is_grouped_along_its_inputs(module, axes):
    made = plan(module, "1:4")
    assert {t.name: t.dim for t in made} == axes
    assert all(t.shape == tuple(module.get_parameter(t.name).shape) for t in made)


def test_depthwise_grouped_transposed_and_unknown_modules_say_why_not():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(8, 8))

    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 3, groups=2), Own(),
        nn.Bilinear(8, 8, 8), nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 2),
    )  # fmt: skip
    made = plan(model, "1:4")
    assert [t.name for t in made] == ["5.weight"]
    reasons = dict(made.left_out)
    assert "depthwise" in reasons["0.weight"]
    assert "grouped transposed" in reasons["1.weight"]
    assert "Own" in reasons["2.table"]
    assert "Bilinear" in reasons["3.weight"]
    assert "embedding" in reasons["4.weight"]
    assert "head" in reasons["6.weight"]
    assert labels(model, ["4", "6.weight"]) == {"4.weight", "6.weight"}


def test_the_output_head_of_a_model_without_names_is_its_last_linear():
    lstm = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "to_tag": nn.Linear(8, 2)})
    assert labels(lstm, "all") == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    plain = nn.ModuleDict({f"fc{i}": nn.Linear(8, 8) for i in (1, 2, 3)})
    assert labels(plain, "all") == {"fc1.weight", "fc2.weight"}
    assert labels(plain, "ff") == {"fc1.weight", "fc2.weight"}
    assert labels(nn.Linear(8, 8), "all") == {"weight"}
    assert "linear2.weight" in labels(nn.TransformerEncoderLayer(8, 2, 8), "ff")
    assert "stem.weight" in labels(Mixer(), "all")
    assert labels(Mixer(), "ff") == {
        f"blocks.0.mlp_{k}.fc{i}.weight" for k in ("tokens", "channels") for i in (1, 2)
    }
    backbone = transformers.ViTModel(vit().config)
    assert "pooler" in dict(plan(backbone, "1:4").left_out)["pooler.dense.weight"]
    assert labels(backbone, "pooler.*") == {"pooler.dense.weight"}


def test_wrappers_do_not_hide_names():
    model = nn.Sequential(TimmBlock())
    wrapped = torch.compile(model)
    assert labels(wrapped, "ff") == {f"_orig_mod.0.mlp.fc{i}.weight" for i in (1, 2)}
    assert labels(wrapped, "0.mlp.fc1") == {"_orig_mod.0.mlp.fc1.weight"}


def test_globs_match_names_and_module_paths_from_the_top():
    model = TimmBlock()
    both = {"mlp.fc1.weight", "mlp.fc2.weight"}
    for glob in ("*.mlp.*", "mlp.*", "mlp.fc?", "*fc[12].weight", "*.fc*"):
        assert labels(model, glob) == both
    assert labels(model, ["*.mlp.*"], exclude="*fc2*") == {"mlp.fc1.weight"}


def test_a_subclass_a_tied_weight_and_a_parametrized_one():
    class MyLinear(nn.Linear):
        pass

    first, second, third = MyLinear(8, 8), MyLinear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    torch.nn.utils.parametrizations.weight_norm(third)
    made = plan(nn.Sequential(first, second, third, nn.Linear(8, 2)), "1:4")
    assert [(t.name, t.note) for t in made] == [("0.weight", "tied with 1.weight")]
    assert sum("parametrized" in why for _, why in made.left_out) == 2
    table, mirror = nn.Embedding(8, 8), nn.Linear(8, 8)
    mirror.weight = table.weight
    tied = nn.ModuleDict({"body": nn.Linear(8, 8), "wte": table, "out": mirror})
    assert labels(tied, "all") == {"body.weight"}
    assert labels(tied, "out") == {"wte.weight"}


@pytest.mark.parametrize("frozen", [False, True])
def test_what_the_caller_left_out_is_the_reason(frozen: bool):
    """Frozen or not: a weight that nobody asked for is not left out for being frozen."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(not frozen)
    for made in (
        plan(model, "1:4", include="*", exclude="0"),
        plan(model, "1:4", include=["1", "2"]),
    ):
        found = dict(made.left_out)
        assert found.keys() == {"0.weight"}
        assert "excluded" in found["0.weight"] or "not chosen" in found["0.weight"]


def test_nothing_left_to_prune_names_what_was_asked_for_alone():
    with pytest.raises(PlanError, match=r"is left to prune.*0\.weight.*not a multiple") as told:
        plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "1:3", "0", remainder="skip")
    assert "1.weight" not in str(told.value)


def test_frozen_wrongly_typed_and_lazy_parameters_are_left_out_with_the_reason():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LazyLinear(4), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    made = plan(model, "1:4", ["*"])
    reasons = dict(made.left_out)
    assert "requires_grad" in reasons["0.weight"]
    assert "batch" in reasons["2.weight"]
    whole_numbers = nn.Linear(8, 8)
    whole_numbers.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PlanError, match="int8"):
        plan(whole_numbers, "1:4")
    with pytest.raises(PlanError, match=r"'0' takes nothing.*requires_grad"):
        plan(model, "1:4", ["0", "1"])


def test_what_m_does_not_divide_is_an_error_or_skipped():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(PlanError, match=r"0\.weight has an axis of 12.*M=8 in 1:8.*remainder"):
        plan(model, "1:8", remainder="error")
    with pytest.raises(PlanError, match=r"0\.weight has an axis of 12"):
        plan(model, "1:8", ["0", "1"])
    with pytest.warns(NMFlowWarning, match=r"'all' leaves out 60\.0%.*0\.weight \(its axis of 12"):
        assert labels(model, "all", "1:8") == {"1.weight"}
    assert labels(model, "all", "1:8", exclude="0") == {"1.weight"}
    made = plan(model, "1:8", remainder="skip")
    assert [t.name for t in made] == ["1.weight"]
    assert "12 is not a multiple of M=8" in dict(made.left_out)["0.weight"]
    with pytest.raises(PlanError, match="is left to prune"):
        plan(model, "1:7", remainder="skip")


BAD = [
    ({"include": "*attention*"}, r"'\*attention\*' matches no weight.*ff: mlp\.fc1\.weight"),
    ({"include": ["ff", "fc9"]}, r"'fc9' matches no weight: did you mean '\*\.fc[12]\.\*'"),
    ({"include": "mpl"}, r"'mpl' matches no weight: did you mean '\*\.mlp\.\*'\?"),
    ({"include": "atn"}, "did you mean"),
    ({"include": "fff"}, r"did you mean 'ff'\?"),
    ({"include": "mlp.*.x"}, "matches no weight"),
    ({"pattern": {"f": "1:4", "*": "1:4"}}, "'f' matches no weight: did you mean"),
    ({"pattern": {"*": "1:4", "ff": "1:2"}}, r"'ff' takes nothing.*taken by the earlier '\*'"),
    ({"pattern": {"ff": "1:4"}, "include": "attn"}, r"'ff' takes nothing.*outside of include"),
    ({"pattern": {"ff": "1:4"}, "include": ["ff", "attn"]}, "include 'attn' takes nothing"),
    ({"exclude": "*"}, r"'all' takes nothing.*excluded by"),
    ({"include": []}, "include is empty"),
    ({"pattern": {}}, "include is empty"),
    ({"include": 3}, "include is 3"),
    ({"exclude": [3]}, r"exclude is \[3\]"),
    ({"pattern": {3: "1:4"}}, r"pattern is \[3\]"),
    ({"remainder": "pad"}, "remainder is 'pad'"),
    ({"model": "vit"}, "model is a str"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_input_gets_one_sentence(given, message):
    arguments = {"model": TimmBlock(), "pattern": "1:4", **given}
    with pytest.raises(PlanError, match=message) as caught:
        plan(**arguments)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_cannot_be_read_is_a_pattern_error():
    with pytest.raises(PatternError):
        plan(TimmBlock(), {"ff": "5:4"})


def test_a_mapping_narrowed_by_include():
    made = plan(TimmBlock(), {"qk": "1:4", "*": "1:8"}, include=["attn"])
    assert [(t.label, t.pattern.m) for t in made] == [
        ("attn.qkv.weight[0:64]", 4), ("attn.qkv.weight[64:96]", 8), ("attn.proj.weight", 8),
    ]  # fmt: skip


def test_a_recipe_notes_the_frames_that_had_to_shrink():
    model = nn.Sequential(nn.Linear(24, 8), nn.Linear(64, 8), nn.Linear(8, 2))
    first, second = plan(model, "1:4", recipe="sdgf-geometric")
    assert "2:8" in first.note
    assert second.note == ""
    assert plan(model, "1:4", recipe="sr-ste")[0].note == ""


def test_the_table_tells_targets_and_reasons():
    text = str(plan(TimmBlock(), {"qk": "1:4", "ff": "1:16"}))
    assert "attn.qkv.weight[0:64]  96x32  1 (32)" in text
    assert "25.00%" in text
    assert "6.25%" in text
    assert "not chosen by 'qk', 'ff': attn.qkv.weight[64:96], attn.proj.weight" in text
    assert f"3 targets, {2048 + 4096:,} weights, of which {512 + 256:,} are kept" in text


NAMES = ["ff", "qk", "qkv", "attn", "*.mlp.*", "*attn*", "*c_proj*", "*h.0*"]
INCLUDE = st.lists(st.sampled_from([*NAMES, "all", "*"]), min_size=1, max_size=3, unique=True)
EXCLUDE = st.lists(st.sampled_from(NAMES), max_size=1)


@settings(max_examples=60, deadline=None)
@given(include=INCLUDE, exclude=EXCLUDE, skip=st.booleans())
def test_every_row_of_every_weight_is_a_target_or_left_out_and_never_both(include, exclude, skip):
    model = GPT2
    try:
        made = plan(model, "1:4", include, exclude, remainder="skip" if skip else "error")
    except PlanError:
        reject()  # a key that is shadowed or excluded as a whole
    rows = {n: [] for n, p in model.named_parameters() if p.ndim >= 2}
    out = {x.name: x.out for x in layers_of(model)}
    for label in [t.label for t in made] + [label for label, _ in made.left_out]:
        name, _, part = label.partition("[")
        rows[name].append(tuple(map(int, part.rstrip("]").split(":"))) if part else (0, out[name]))
    for name, spans in rows.items():
        spans.sort()
        assert spans[0][0] == 0
        assert spans[-1][1] == out[name]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    for target in made:
        assert target.shape[target.dim] % target.pattern.m == 0


@pytest.mark.parametrize("build", [vit, swinv2, t5, bert, gpt2, marian, torch_transformer, Timm])
def test_a_bare_state_tells_the_same_as_the_model(build):
    model = build()
    of_model = {x.name: x for x in layers_of(model) if not x.why_not}
    of_state = {
        x.name: x for x in layers_of_state({n: p.shape for n, p in model.named_parameters()})
    }
    for name, layer in of_model.items():
        assert of_state[name].dim == layer.dim, name
        roles = {p.role for p in layer.parts} - {"embedding", "position"}
        assert not roles or of_state[name].parts == layer.parts, name


def test_names_of_gpt2_in_a_state_of_plain_linears_are_told_by_their_shapes():
    state = {"h.0.attn.c_attn.weight": (96, 32), "h.0.attn.c_proj.weight": (32, 32)}
    assert [x.dim for x in layers_of_state(state)] == [1, 1]


@pytest.mark.parametrize("module", [nmflow.select.roles, nmflow.text_table, nmflow.select.plan])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
