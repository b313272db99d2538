"""Calibration in what users have around a network: autocast, fast paths, two sides, odd batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmflow.errors import WeightError
from nmflow.masks import mask, wanda_score
from nmflow.oneshot import prune, sparsegpt

hf = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Fused(nn.Module):
    """Queries, keys and values in one weight; the values are multiplied on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv.weight
        return torch.cat([nn.functional.linear(x, part) for part in (w[32:], w[:32])], -1)


class Casting(nn.Linear):
    """Casts its weight itself, as some networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.bfloat16(), self.weight.to(torch.bfloat16)).float()


LAYERS: dict[str, tuple[Callable[[], Any], int]] = {
    "linear": (lambda: nn.Linear(16, 24), 1),
    "conv1d": (lambda: Conv1D(24, 16), 0),
    "fused": (Fused, 1),
    "casting": (lambda: Casting(16, 24, bias=False), 1),
}


def prepared(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def by_hand(layer: Any, dim: int, xs: list[Tensor], method: str) -> Tensor:
    """The pruned weight, of the inputs as autocast gives them to a product."""
    x = torch.cat(xs).bfloat16().float()
    w = next(layer.parameters()).detach()
    if method == "sparsegpt":
        made = sparsegpt(w if dim else w.T, x.T @ x, "2:4")
        return made if dim else made.T
    kept = mask(wanda_score(w, x.square().sum(0).sqrt(), dim), "2:4", dim)
    return torch.where(kept, w, 0.0)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_calibrated_in_mixed_precision(name: str, where: str, method: str) -> None:
    torch.manual_seed(0)
    make, dim = LAYERS[name]
    model = make().train()
    xs = [torch.randn(32, 16) for _ in range(3)]
    before = next(model.parameters()).detach().clone()
    wanted = by_hand(model, dim, xs, method)
    if where == "inside":
        model = prepared(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        model(xs[0])
        include = "qk" if name == "fused" else "*"
        prune(model, "2:4", include, method=method, calibration=xs)
    weight = next(model.parameters())
    if name == "fused":
        assert torch.equal(weight[32:], before[32:])
        weight, wanted = weight[:32], wanted[:32]
    torch.testing.assert_close(weight.detach(), wanted, atol=1e-5, rtol=1e-4)
    assert model.training
    assert weight.dtype == torch.float32
    assert weight.requires_grad


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


FAST: dict[str, tuple[Callable[[], Any], str]] = {
    "attention": (Attend, "attn.in_proj_weight"),
    "encoder": (encoder, "layers.0.self_attn.in_proj_weight"),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", FAST)
def test_attention_with_a_fast_path_is_calibrated_without_it(name: str, fast: bool) -> None:
    torch.manual_seed(0)
    make, first = FAST[name]
    model, xs = make().train(), [torch.randn(4, 6, 16) for _ in range(2)]
    w, x = model.get_parameter(first).detach().clone(), torch.cat(xs).flatten(0, 1)
    kept = mask(wanda_score(w, x.square().sum(0).sqrt()), "2:4")
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        prune(model, "2:4", method="wanda", calibration=xs)
        assert torch.backends.mha.get_fastpath_enabled() == fast
        with pytest.raises(WeightError, match="does not fit the forward"):
            prune(model, "2:4", method="wanda", calibration=[{"nothing": xs[0]}])
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(model.get_parameter(first), torch.where(kept, w, 0.0))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padding_of_an_encoder_says_nothing_of_its_decoder(name: str, method: str) -> None:
    """With as many tokens on both sides as with fewer in the encoder, which tell them apart."""
    if name == "bart":
        config = hf.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
            encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
        )  # fmt: skip
        model: Any = hf.BartForConditionalGeneration(config)
    else:
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
        )
    torch.manual_seed(0)
    ids, decoded = torch.randint(3, 40, (1, 6)), torch.randint(3, 40, (1, 6))
    seen = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = {"input_ids": ids, "attention_mask": seen, "decoder_input_ids": decoded}
    short = {**padded, "input_ids": ids[:, :4], "attention_mask": seen[:, :4]}
    found, wanted = copy.deepcopy(model), copy.deepcopy(model)
    for one, batch in ((found, padded), (wanted, short)):
        prune(one, "2:4", ("ff", "attn"), method=method, calibration=[batch])
    for (key, x), y in zip(found.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3, msg=key)


X = torch.ones(4, 16)


@pytest.mark.parametrize("calibration", [X, {"input": X}, "text", 5])
def test_calibration_is_several_batches(calibration: Any) -> None:
    """A batch itself would be read row by row, or name by name."""
    model = nn.Linear(16, 8)
    before = model.weight.detach().clone()
    with pytest.raises(WeightError, match=r"calibration is a \w+: give a list.*\[batch\]"):
        prune(model, "2:4", include="*", method="wanda", calibration=calibration)
    assert torch.equal(model.weight, before)
