"""FLOPs against counts by hand and against torch's own counter; bytes, kept weights, phases."""

from __future__ import annotations

import doctest
import importlib
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nmflow.errors import DataError, PlanError, RecipeError
from nmflow.inspect.cost import cost
from nmflow.inspect.flops import count
from nmflow.inspect.training_flops import RULE, shares
from nmflow.pattern import Pattern
from nmflow.recipes import MDGF, SDGF, SRSTE, Gradual, Hybrid, MaxQ, OneShot
from nmflow.recipes.schedules import Stage

transformers = pytest.importorskip("transformers")


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 8))


def test_an_mlp_by_hand():
    found = cost(mlp(), torch.randn(10, 64), "1:16")
    assert found.dense_flops == 2 * 10 * (64 * 128 + 128 * 64 + 64 * 8)
    assert found.flops == 2 * 10 * (64 * 128 // 16 + 128 * 64 // 16 + 64 * 8)
    assert found.other_flops == 0
    assert found.parameters == 64 * 128 + 128 + 128 * 64 + 64 + 64 * 8 + 8
    assert found.targeted == 2 * 64 * 128
    assert found.kept == 64 * 128 // 8
    assert found.remaining == found.parameters - found.targeted + found.kept
    assert found.dense_bytes == 4 * found.parameters
    assert found.index_bytes == 2 * 512 * 4 // 8  # four bits for one of sixteen
    assert found.bytes == 4 * found.remaining + found.index_bytes


@pytest.mark.parametrize(
    ("pattern", "index_bits"),
    [
        ("1:16", 128 * 4 * 4), ("2:4", 128 * 32 * 2), ("1:128", None), ("4:64", 128 * 4 * 6),
        ("3:8@16", 8 * 24 * 3), ("1:4@48", 3 * 16 * 2), ("4:4", 0), ("1:1", 0),
    ],
)  # fmt: skip
def test_index_bits_are_log2_m_a_kept_weight_and_shared_by_a_panel(pattern, index_bits):
    model = nn.Linear(64, 128)
    if index_bits is None:
        with pytest.raises(PlanError, match="not a multiple of M=128"):
            cost(model, torch.randn(1, 64), pattern)
        return
    p = Pattern(pattern)
    found = cost(model, torch.randn(1, 64), pattern)
    assert found.index_bytes == -(-index_bits // 8)
    assert found.kept == 128 * 64 * p.n // p.m
    half = cost(model.to(torch.bfloat16), torch.randn(1, 64, dtype=torch.bfloat16), pattern)
    assert half.bytes == 2 * found.remaining + found.index_bytes


def test_convolutions_count_per_position():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, groups=2),
        nn.Conv2d(32, 32, 3, groups=32), nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Flatten(),
    )  # fmt: skip
    x = torch.randn(3, 8, 14, 14)
    found = cost(model, x, "1:4", recipe="sr-ste", total_steps=1)
    by_hand = {
        "0.weight": 2 * 3 * 7 * 7 * 16 * 8 * 9,
        "1.weight": 2 * 3 * 5 * 5 * 32 * 8 * 9,
        "3.weight": 2 * 3 * 3 * 3 * 32 * 16 * 4,
    }
    depthwise = 2 * 3 * 3 * 3 * 32 * 9
    assert {row.name: row.dense_flops for row in found.rows} == by_hand
    assert found.dense_flops == sum(by_hand.values()) + depthwise
    # The first layer's input needs no gradient; every other product comes twice in backward.
    total = found.dense_flops
    assert found.dense_step == 3 * total - by_hand["0.weight"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_by_hand(kind):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    model = kind(16, 32, num_layers=2, batch_first=True, bidirectional=True)
    x = torch.randn(5, 7, 16)
    found = cost(model, x, "1:4", recipe="dense", total_steps=1)
    flops = {row.name: row.dense_flops for row in found.rows}
    for way in ("", "_reverse"):
        assert flops[f"weight_ih_l0{way}"] == 2 * 5 * 7 * gates * 32 * 16
        assert flops[f"weight_hh_l0{way}"] == 2 * 5 * 7 * gates * 32 * 32
        assert flops[f"weight_ih_l1{way}"] == 2 * 5 * 7 * gates * 32 * 64
    assert found.other_flops == 0
    assert found.dense_flops == sum(flops.values())


def test_attention_is_split_into_its_weights_and_the_rest():
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 10, 64)
    found = cost(attention, (x, x, x), {"qk": "1:8"})
    (row,) = found.rows
    assert row.name == "in_proj_weight[0:128]"
    assert row.dense_flops == 2 * 20 * 64 * 128
    assert row.flops == row.dense_flops // 8
    scores = 2 * 2 * 4 * 10 * 10 * 16
    assert found.other_flops == 2 * scores
    assert found.dense_flops == 2 * 20 * 64 * 256 + 2 * scores
    # Cross attention reads the fused weight in slices: the rows' products must still be theirs.
    y = torch.randn(2, 30, 64)
    (row,) = cost(attention, (x, y, y), {"qk": "1:8"}).rows
    assert row.dense_flops == 2 * 20 * 64 * 64 + 2 * 60 * 64 * 64


def test_the_fast_path_of_torch_encoders_hides_nothing():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 10, 64)
    by_hand = 2 * 20 * (64 * 192 + 64 * 64 + 2 * 64 * 128) + 2 * 2 * 2 * 4 * 10 * 10 * 16
    assert cost(layer, x).dense_flops == by_hand
    assert cost(layer.train().requires_grad_(False), x).dense_flops == by_hand
    assert torch.backends.mha.get_fastpath_enabled()
    assert layer.training


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
            eos_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip


def resnet():
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


def marian():
    return transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=48, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2,
            pad_token_id=0, eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=0,
            attn_implementation="eager", max_position_embeddings=16,
        )
    )  # fmt: skip


IDS = torch.arange(24).reshape(2, 12)
MODELS = [
    (mlp, torch.randn(10, 64)),
    (lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)), torch.randn(2, 8, 9, 9)),
    (lambda: nn.GRU(16, 32), torch.randn(7, 5, 16)),
    (gpt2, {"input_ids": IDS}),
    (marian, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    (resnet, torch.randn(2, 3, 32, 32)),
]


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_forward_and_backward_agree_with_torchs_own_counter(build, inputs):
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with FlopCounterMode(display=False) as forward, torch.backends.mkldnn.flags(enabled=False):
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if not isinstance(out, torch.Tensor):
        out = out[0] if isinstance(out, tuple) else out.logits
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    before = {n: p.grad for n, p in model.named_parameters()}
    passes = count(model, inputs, backward=True)
    assert passes.forward_total == forward.get_total_flops()
    assert passes.backward_total == backward.get_total_flops()
    assert all(p.grad is before[n] for n, p in model.named_parameters())
    # Attention's own products have two factors, so they come twice in backward.
    assert passes.other_backward == 2 * passes.other_forward


def test_fused_attention_kernels_count_the_same_as_eager_ones():
    config = gpt2().config
    config._attn_implementation = "sdpa"
    fused = transformers.GPT2LMHeadModel(config)
    eager, sdpa = cost(gpt2(), {"input_ids": IDS}), cost(fused, {"input_ids": IDS})
    assert eager.dense_flops == sdpa.dense_flops
    assert eager.other_flops == 2 * (2 * 2 * 2 * 2 * 12 * 12 * 16)


def test_a_tied_weight_counts_where_it_is_used():
    model = gpt2()
    found = cost(model, {"input_ids": IDS}, {"*wte*": "1:4"})
    assert found.rows[0].dense_flops == 2 * 24 * 48 * 32
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_the_rows_of_gpt2s_fused_projection():
    found = cost(gpt2(), {"input_ids": IDS}, {"qk": "1:8", "ff": "1:16"})
    rows = {row.name: row for row in found.rows}
    fused = rows["transformer.h.0.attn.c_attn.weight[0:64]"]
    assert (fused.weights, fused.kept) == (32 * 64, 32 * 64 // 8)
    assert fused.dense_flops == 2 * 24 * 32 * 64
    assert found.flops == found.dense_flops - sum(r.dense_flops - r.flops for r in found.rows)


def test_autocast_and_compile_do_not_hide_a_weight():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x)

    x = torch.randn(10, 64)
    plain = cost(mlp(), x, "1:16")
    assert [r.dense_flops for r in cost(Cast(), x, "1:16").rows] == [
        r.dense_flops for r in plain.rows
    ]
    wrapped = torch.compile(mlp())
    assert isinstance(wrapped, nn.Module)
    compiled = cost(wrapped, x, "1:16", recipe="sr-ste", total_steps=2)
    assert compiled.flops == plain.flops


def test_examples_go_where_the_model_is():
    """A network on another device, the meta device here, takes the examples of a CPU."""
    model, x = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(3, 32)
    here = cost(model, x, "1:16").to_dict()
    assert cost(model.to("meta"), x, "1:16").to_dict() == here
    assert cost(model, {"input": x}, "1:16").to_dict() == here


def test_a_plain_product_of_a_vector_is_counted():
    assert cost(nn.Linear(64, 8, bias=False), torch.randn(64)).dense_flops == 2 * 64 * 8

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 8)

        def forward(self, x):
            return F.linear(x, self.inner.weight[2:6])

    found = cost(Functional(), torch.randn(3, 64), {"inner": "1:4"})
    assert found.rows[0].dense_flops == 2 * 3 * 64 * 4


def step_by_hand(share, weight_share=1.0):
    """An MLP's step: forward, input gradients (none for the first layer), weight gradients."""
    first, second, head = (2 * 10 * 64 * 128, 2 * 10 * 128 * 64, 2 * 10 * 64 * 8)
    forward = share * (first + second) + head
    backward_input = share * second + head
    backward_weight = weight_share * (first + second) + head
    return forward + backward_input + backward_weight


def test_training_flops_by_phase_follow_the_rule():
    x = torch.randn(10, 64)

    def run(recipe):
        return cost(mlp(), x, "1:16", recipe=recipe, total_steps=100)

    found = run(SRSTE(dense=0.1))
    assert found.dense_step == step_by_hand(1)
    assert found.dense_training == 100 * step_by_hand(1)
    assert found.training == {"dense": 10 * step_by_hand(1), "sparse": 90 * step_by_hand(1 / 16)}
    assert found.steps == {"dense": 10, "sparse": 90}
    for gradient, share in (("straight-through", 1), ("masked", 1 / 16)):
        found = run(MDGF(gradient=gradient, dense=0.1, finetune=0.2))
        assert found.training == {
            "dense": 10 * step_by_hand(1), "decay": 70 * step_by_hand(1),
            "finetune": 20 * step_by_hand(1 / 16, share),
        }  # fmt: skip
    found = run(OneShot(dense=0.5))
    (after,) = set(found.steps) - {"dense"}
    assert found.training[after] == 50 * step_by_hand(1 / 16, 1 / 16)
    found = run(SDGF("geometric", finetune=0.2))
    assert found.training["decay"] == 80 * step_by_hand(1 / 16)
    found = run(SDGF("stepwise", finetune=0.0))  # 15, 8, 4, 2, 1 of 16, twenty steps each
    assert found.training["decay"] == sum(20 * step_by_hand(n / 16) for n in (15, 8, 4, 2, 1))
    found = run(Gradual(dense=0.1, finetune=0.8))  # ten steps: ⌈1 + 15·(1 - t/10)³⌉ of 16
    kept = (15, 12, 9, 7, 5, 3, 2, 2, 2, 2)
    assert found.training["decay"] == sum(step_by_hand(n / 16, n / 16) for n in kept)
    assert found.training["finetune"] == 80 * step_by_hand(1 / 16, 1 / 16)
    found = run(Gradual(gradient="straight-through", dense=0.1, finetune=0.8))
    assert found.training["decay"] == sum(step_by_hand(n / 16) for n in kept)
    found = run(MaxQ("linear", dense=0.1, finetune=0.8))  # whole groups: 1, 0.9 … 0.1 of them
    kept = (t / 10 + (1 - t / 10) / 16 for t in range(10, 0, -1))
    assert found.training["decay"] == pytest.approx(sum(map(step_by_hand, kept)), rel=1e-12)
    assert found.training["finetune"] == 80 * step_by_hand(1 / 16)
    found = run("dense")
    assert found.training == {"dense": 100 * step_by_hand(1)}
    assert found.flops == found.dense_flops
    assert found.kept == found.targeted
    assert found.bytes == found.dense_bytes


def test_frozen_weights_have_no_gradient_to_pay_for():
    model = mlp()
    model[0].requires_grad_(False)
    found = cost(model, torch.randn(10, 64), "1:16", recipe="sr-ste", total_steps=1)
    first, second, head = (2 * 10 * 64 * 128, 2 * 10 * 128 * 64, 2 * 10 * 64 * 8)
    # Nothing before the second layer needs a gradient, so its input gets none.
    assert found.dense_step == first + 2 * second + 3 * head


@pytest.mark.parametrize(
    ("stage", "gradient", "expected"),
    [
        (Stage("dense", None, None, 1.0), "masked", (1, 1)),
        (Stage("decay", Pattern("1:4"), None, 0.5), "straight-through", (1, 1)),
        (Stage("decay", Pattern("1:4"), None, 0.5), "masked", (1, 1)),
        (Stage("decay", Pattern("1:4"), None, 0.0), "straight-through", (0.25, 1)),
        (Stage("finetune", Pattern("1:4")), "masked", (0.25, 0.25)),
        (Stage("decay", Pattern("1:4"), Pattern("2:4"), 1.0), "masked", (0.5, 0.5)),
        (Stage("decay", Pattern("1:4"), Pattern("2:8"), 0.3), "masked", (0.5, 0.5)),
        (Stage("decay", Pattern("2:4"), Pattern("6:8"), 0.3), "straight-through", (1, 1)),
        (Stage("decay", Pattern("1:4"), whole=1.0), "straight-through", (1, 1)),
        (Stage("decay", Pattern("1:4"), whole=0.5), "straight-through", (0.625, 1)),
        (Stage("decay", Pattern("1:4"), whole=0.5), "masked", (0.625, 0.625)),
    ],
)
def test_shares(stage, gradient, expected):
    assert shares(stage, gradient) == expected


def test_a_hybrid_costs_what_its_two_masks_keep():
    # Frames 3:4, 2:4, 1:4 of ten steps: the first fades from everything, the others from the last.
    for gradient, by_hand in (
        ("straight-through", sum(10 * step_by_hand(n / 4) for n in (4, 3, 2))),
        ("masked", sum(10 * step_by_hand(n / 4, n / 4) for n in (4, 3, 2))),
    ):
        recipe = Hybrid(structure="stepwise", gradient=gradient, finetune=0.0)
        found = cost(mlp(), torch.randn(10, 64), "1:4", recipe=recipe, total_steps=30)
        assert found.training["decay"] == by_hand


BAD = [
    ({"recipe": "sr-ste"}, RecipeError, "total_steps is missing"),
    ({"recipe": "sr-ste", "total_steps": 3, "pattern": None}, RecipeError, "pattern is missing"),
    ({"total_steps": 3}, RecipeError, "there is no recipe"),
    ({"recipe": "sr-ste", "total_steps": 0}, RecipeError, "total_steps is 0"),
    ({"recipe": "nope", "total_steps": 3}, RecipeError, "'nope'"),
    ({"include": "*nope*"}, PlanError, "matches no weight"),
    ({"example_inputs": 3}, DataError, "example_inputs is of type int"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_bad_input(given, error, message):
    with pytest.raises(error, match=message):
        cost(**{"model": mlp(), "example_inputs": torch.randn(1, 64), "pattern": "1:4", **given})


def test_outputs_without_a_gradient_are_refused_for_training():
    class Argmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x).argmax(-1)

    with pytest.raises(DataError, match="no gradient"):
        cost(Argmax(), torch.randn(1, 64), "1:4", recipe="sr-ste", total_steps=1)
    assert cost(Argmax(), torch.randn(1, 64), "1:4").flops > 0


def test_the_table_and_the_dict():
    found = cost(mlp(), torch.randn(10, 64), "1:16", recipe="mdgf-linear", total_steps=50)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["training_flops"] == found.training_flops == sum(found.training.values())
    assert told["rows"][0]["kept"] == 512
    text = str(found)
    assert f"{found.flops:,}" in text
    assert "training FLOPs, decay (40 steps)" in text
    assert RULE in text
    assert RULE not in str(cost(mlp(), torch.randn(10, 64)))


def test_examples():
    assert doctest.testmod(importlib.import_module("nmflow.inspect.cost")).failed == 0
