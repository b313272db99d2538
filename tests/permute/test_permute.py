"""Hidden units in another order: the function stays, masks keep more, training goes on the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
from nmflow.errors import FlowError, PlanError
from nmflow.permute.orders import kept_share, order_for_groups, order_for_panels

hf = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "intermediate_size": 64, "vocab_size": 64, "pad_token_id": 0}
MODELS = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**TEXT)), "encoder.layer.0", 64),
    "vit": (
        lambda: hf.ViTModel(
            hf.ViTConfig(**SMALL, intermediate_size=64, image_size=8, patch_size=4)
        ),
        "",
        64,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=16,
                vocab_size=64,
                bos_token_id=1,
                eos_token_id=1,
            )
        ),
        "transformer.h.0.mlp",
        128,
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), "model.layers.0.mlp", 64),
    "phi3, gate and up fused": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT, bos_token_id=1, eos_token_id=1)),
        "model.layers.0.mlp",
        64,
    ),
}


def inputs_of(name: str) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8) if name == "vit" else torch.randint(1, 64, (2, 9))


def first(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))  # type: ignore


@pytest.mark.parametrize("pattern", ["1:8", "1:4@16", "2:4@4"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_of_real_networks_stays(name: str, pattern: str) -> None:
    torch.manual_seed(0)
    build, where, units = MODELS[name]
    model, x = build().double().train(), inputs_of(name)
    x = x.double() if x.is_floating_point() else x
    for p in model.parameters():  # biases too, which begin as zeros
        p.data += 0.1 * torch.randn_like(p)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    model.eval()
    before = first(model(x))
    model.train()
    done = nmflow.permute_hidden(model, (x,), pattern)
    assert model.training
    assert len(done) == 2
    assert not done.left_out
    assert not where or done[0].name == where
    model.eval()
    torch.testing.assert_close(first(model(x)), before)
    for block in done:
        assert block.units == units
        assert sorted(block.order.tolist()) == list(range(units))
        if pattern == "1:8":
            assert block.down[1] > block.down[0]
            assert block.up[1] == pytest.approx(block.up[0])
        else:
            assert block.up[1] > block.up[0]
        assert block.name in str(done)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed
    for n, p in model.named_parameters():
        assert torch.equal(p.flatten().sort().values, weights[n].flatten().sort().values)


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:8", "7:8", "1:16", "1:4@4", "4:4"])
def test_an_order_for_groups_keeps_no_less(pattern: str) -> None:
    p = nmflow.Pattern(pattern)
    for seed in range(5):
        torch.manual_seed(seed)
        w = torch.randn(12, 32) * torch.rand(1, 32) ** 2
        if seed == 4:  # nothing but ties
            w = torch.ones_like(w)
        order = order_for_groups(w, p, rounds=12, seed=seed)
        assert sorted(order.tolist()) == list(range(32))
        assert kept_share(w[:, order], p) >= kept_share(w, p) - 1e-6
        assert torch.equal(order, order_for_groups(w, p, rounds=12, seed=seed))
        inner = order_for_groups(w, p, rounds=12, seed=seed, within=2 * p.m)
        runs = inner.reshape(-1, 2 * p.m).sort(1).values.flatten()
        assert torch.equal(runs, torch.arange(32))


def test_two_groups_trade_what_brute_force_trades() -> None:
    """One round on two groups is the best of all single trades."""
    for n, seed in itertools.product((1, 2, 3), range(6)):
        torch.manual_seed(seed)
        w, p = torch.randn(5, 8), nmflow.Pattern(f"{n}:4")
        best = kept_share(w, p)
        for i, j in itertools.product(range(4), range(4, 8)):
            order = list(range(8))
            order[i], order[j] = j, i
            best = max(best, kept_share(w[:, order], p))
        assert kept_share(w[:, order_for_groups(w, p, rounds=1)], p) == pytest.approx(best)


def test_rows_that_keep_the_same_columns_share_a_panel() -> None:
    """Rows of four kinds, shuffled, come back together, a panel a kind; a short panel is last."""
    torch.manual_seed(0)
    kinds = torch.arange(4).repeat_interleave(4)[torch.randperm(16)]
    w = 0.01 * torch.randn(16, 16)
    w[torch.arange(16), kinds] += 1 + torch.rand(16)
    order = order_for_panels(w, nmflow.Pattern("1:4@4"))
    assert all(len(set(kinds[run].tolist())) == 1 for run in order.split(4))
    order = order_for_panels(w[:14], nmflow.Pattern("1:4@4"))
    assert sorted(order.tolist()) == list(range(14))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).double()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("under_flow", [False, True])
def test_a_run_goes_on_as_if_nothing_had_happened(make: type, under_flow: bool) -> None:
    """The optimizer's state goes along, and the dense weights of a flow in its dense phase."""
    model, twin, data = mlp(), mlp(), torch.randn(9, 4, 8).double()
    optimizers = [make(m.parameters(), lr=0.01) for m in (model, twin)]
    flow = None
    if under_flow:
        recipe = nmflow.Settling(dense=12)
        options = {"include": "*", "total_steps": 20, "mask_interval": 2}
        flow = nmflow.attach(model, optimizers[0], recipe, "1:4", **options)
        nmflow.attach(twin, optimizers[1], recipe, "1:4", **options)
    for k, x in enumerate(data):
        if k == 5:
            more: dict[str, Any] = {"flow": flow} if under_flow else {"optimizer": optimizers[0]}
            (done,) = nmflow.permute_hidden(model, x, "1:4", include="*", **more)
            assert not torch.equal(done.order, torch.arange(32))
        for m, o in zip((model, twin), optimizers, strict=True):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
        torch.testing.assert_close(model(x), twin(x))
    first, second = twin.get_parameter("0.weight"), twin.get_parameter("2.weight")
    torch.testing.assert_close(model.get_parameter("0.weight"), first[done.order])
    if flow is not None:
        dense = flow.dense_weights()
        torch.testing.assert_close(dense["2.weight"], second[:, done.order])


class Normed(nn.Module):
    """A block whose hidden units are told apart by a norm's weights, beside one that is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()
        self.norm = nn.LayerNorm(32).double()
        self.norm.weight.data = torch.rand(32).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return x + self.b[2](self.norm(self.b[1](self.b[0](x))))


def test_a_block_that_an_order_changes_is_put_back_and_named() -> None:
    model, x = Normed(), torch.randn(4, 8).double()
    old = {n: p.clone() for n, p in model.named_parameters()}
    y = model(x)
    done = nmflow.permute_hidden(model, x, "1:4", include="*")
    assert [block.name for block in done] == ["a"]
    assert ("b", "another order of its units changes the outputs") in done.left_out
    assert "left out: b" in str(done)
    torch.testing.assert_close(model(x), y)
    for name, p in model.named_parameters():
        assert torch.equal(p, old[name]) == (not name.startswith("a.") or name == "a.2.bias")


def test_refusals_change_nothing() -> None:
    x = torch.randn(4, 8).double()

    def refused(match: str, error: type = FlowError, **more: object) -> None:
        old = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(error, match=match):
            nmflow.permute_hidden(model, x, "1:4", include="*", **more)  # type: ignore[arg-type]
        assert all(torch.equal(p, old[n]) for n, p in model.named_parameters())

    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    flow = nmflow.attach(model, optimizer, nmflow.STE(dense=1), "1:4", include="*", total_steps=4)
    refused("recipe attached")
    model(x).sum().backward()
    optimizer.step()
    refused("past its dense phase", flow=flow)
    model = mlp()
    adafactor = torch.optim.Adafactor(model.parameters())
    model(x).sum().backward()
    adafactor.step()
    refused("row_var", optimizer=adafactor)
    model = nn.Sequential(nn.Linear(8, 16)).double()
    refused("no feed-forward block", PlanError)
