"""Packed layers that are computed in one call: the same results, and apart where that is right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import nmflow
from nmflow.errors import CompressError
from nmflow.kernels import explain
from nmflow.packed import compress, decompress, report_of, together
from nmflow.packed.blocks import Chain, Siblings, unwatch
from pruned import NETWORKS, prune

ROUNDINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8 values": {"values": "int8"},
    "int8": {"values": "int8", "activations": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
}


def bert() -> BertModel:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    return BertModel(config)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


IDS = {"input_ids": torch.arange(12).view(2, 6)}
# Groups of a network: of feed-forward blocks, and of q, k and v. T5 has a dropout in its blocks.
GROUPS: dict[str, tuple[Callable[[], Any], dict[str, Any], int, int]] = {
    "vit": (*NETWORKS["vit"][:2], 2, 2),
    "t5": (*NETWORKS["t5"][:2], 0, 2),
    "gpt2": (*NETWORKS["gpt2"][:2], 2, 0),
    "bert": (bert, IDS, 2, 2),
    "llama": (llama, IDS, 2, 2),
}


def blocks_of(model: nn.Module) -> list[Any]:  # of Chain and Siblings
    found = [getattr(m, "computed_with", None) for m in model.modules()]
    return [b for b in dict.fromkeys(found) if b is not None]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_networks_give_the_same(name: str, rounding: str) -> None:
    make, inputs, chains, siblings = GROUPS[name]
    torch.manual_seed(0)
    model = prune(make())
    whole = compress(model, measure=False, **ROUNDINGS[rounding])
    apart = compress(model, measure=False, fuse=False, **ROUNDINGS[rounding])
    kinds = [type(b) for b in blocks_of(whole)]
    # bfloat16 layers convert what they read, so nothing is handed on as it is.
    assert kinds.count(Chain) == (0 if rounding == "bfloat16" else chains)
    assert kinds.count(Siblings) == siblings
    assert len(report_of(whole).together) == len(kinds)
    assert blocks_of(apart) == []
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with guard():
            found, want = whole(**inputs)[0], apart(**inputs)[0]
        near = 2e-2 if rounding == "bfloat16" else 1e-5
        torch.testing.assert_close(found, want, atol=near, rtol=near)
    with torch.no_grad():  # and in other shapes of the same
        one = {key: value[:1] for key, value in inputs.items()}
        torch.testing.assert_close(whole(**one)[0], apart(**one)[0], atol=near, rtol=near)
    assert str(decompress(whole)) == str(model)
    back = decompress(whole).state_dict()
    for key, value in decompress(apart).state_dict().items():
        assert torch.equal(back[key], value)


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.act, self.down = nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)
        self.gate, self.drop = nn.Linear(32, 64), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        form, h = self.form, self.act(self.gate(x) if self.form.startswith("gated") else self.up(x))
        if form == "plain":
            return self.down(h)
        if form == "dropout behind":
            return self.drop(self.down(h))
        if form == "gated":
            return self.down(h * self.up(x))
        if form == "gated, the other way":
            return self.down(self.up(x) * h)
        if form == "gated by another x":
            return self.down(h * self.up(x + 1))
        if form == "gated and read":
            u = self.up(x)
            return self.down(h * u) + u.sum()
        if form == "dropout between":
            return self.down(self.drop(h))
        if form == "function between":
            return self.down(torch.tanh(h))
        if form == "returned":
            return self.down(h), h
        if form == "read twice":
            return self.down(h) + self.down(h)
        if form == "cut":
            return self.down(h[..., :64])
        raise AssertionError(form)


FORMS = {
    "plain": 2, "dropout behind": 2, "gated": 3, "gated, the other way": 3,
    "gated by another x": 0, "gated and read": 0, "dropout between": 0, "function between": 0,
    "returned": 0, "read twice": 0, "cut": 0,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_joined_only_where_nobody_else_reads(form: str) -> None:
    torch.manual_seed(0)
    model = prune(nn.Sequential(Block(form)))
    packed = compress(model, measure=False)
    apart = compress(model, measure=False, fuse=False)
    groups = report_of(packed).together
    assert [len(group) for group in groups] == ([FORMS[form]] if FORMS[form] else [])
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        pairs = zip(tensors(packed(x)), tensors(apart(x)), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    ways = []
    for network in (packed, apart):  # gradients, and dropout in training mode
        network.train()
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        torch.stack([t.square().sum() for t in tensors(network(given))]).sum().backward()
        ways.append([given.grad, *(p.grad for p in network.parameters())])
    for got, want in zip(*ways, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 48), nn.Linear(32, 16), nn.Linear(32, 21)

    def forward(self, x: Tensor, other: Tensor | None = None, write: bool = False) -> Tensor:
        q = self.q(x)
        if write:
            x.mul_(2)
        other = x if other is None else other
        return torch.cat([q, self.k(other), self.v(other)], -1)


@pytest.fixture(params=ROUNDINGS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = prune(Attention())
    how = ROUNDINGS[request.param]
    return compress(model, measure=False, **how), compress(model, measure=False, fuse=False, **how)


def agree(whole: Any, apart: Any, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        one = whole(*[a.clone() for a in args], **kwargs)
        two = apart(*[a.clone() for a in args], **kwargs)
    assert torch.equal(one, two)


def test_siblings_compute_once_and_keep_nothing(pair: tuple[Any, Any]) -> None:
    whole, apart = pair
    (siblings,) = blocks_of(whole)
    calls = []
    at_once = siblings.whole.at_once
    siblings.whole.at_once = lambda x: calls.append(1) or at_once(x)
    x = torch.randn(5, 32)
    for shape in ((5, 32), (1, 5, 32), (1, 32), (32,), (0, 32)):
        agree(whole, apart, x[: shape[-2] if len(shape) > 1 else 1].reshape(shape))
    assert len(calls) == 5
    assert siblings._held is None
    own = {b.data_ptr() for b in siblings.whole._buffers.values()}
    assert own == {b.data_ptr() for b in whole.q._buffers.values()}  # no second copy


def test_siblings_of_another_x_are_apart(pair: tuple[Any, Any]) -> None:
    whole, apart = pair
    (siblings,) = blocks_of(whole)
    x = torch.randn(5, 32)
    agree(whole, apart, x, write=True)
    agree(whole, apart, x)
    for _ in range(3):
        agree(whole, apart, x, torch.randn(4, 5, 32)[0])
    assert siblings.unasked == 2  # it gave up
    assert siblings._held is None
    agree(whole, apart, x)


def test_siblings_end_where_their_memory_does(pair: tuple[Any, Any]) -> None:
    whole, apart = pair
    x = torch.randn(5, 32)

    def still(model: Any) -> bool:
        return blocks_of(model)[0].is_whole()

    for copied in (copy.deepcopy(whole), torch.load(saved(whole), weights_only=False)):
        agree(copied, apart, x)
        assert still(copied)
    agree(pickle.loads(pickle.dumps(whole)), apart, x)
    state = {k: v.clone() for k, v in apart.state_dict().items()}
    for assign in (False, True):
        whole.load_state_dict(state, assign=assign)
        agree(whole, apart, x)
        assert still(whole) == (not assign)
    if whole.q.rounding:
        return
    half = [copy.deepcopy(m).half() for m in pair]
    assert not still(half[0])
    agree(*half, x.half())


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_siblings_follow_what_is_written_into_them(pair: tuple[Any, Any]) -> None:
    whole, apart = pair
    x = torch.randn(3, 32)
    agree(whole, apart, x)
    for model in (whole, apart):
        with torch.no_grad():
            model.k.bias.add_(1)
            model.v.load_state_dict({k: v.clone() for k, v in model.v.state_dict().items()})
    agree(whole, apart, x)
    for model in (whole, apart):
        model.v.bias.data = torch.full_like(model.v.bias, 3.0)
    agree(whole, apart, x)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_files_know_nothing_of_it(name: str, tmp_path: Path) -> None:
    make, inputs, *_ = GROUPS[name]
    torch.manual_seed(0)
    model = prune(make())
    whole = compress(model, measure=False)
    apart = compress(model, measure=False, fuse=False)
    for number, packed in enumerate((whole, apart)):
        nmflow.save(packed, tmp_path / str(number))
    files = sorted(f.name for f in (tmp_path / "0").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "1").iterdir())
    for file in files:
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file
    loaded = nmflow.load(tmp_path / "0", make().eval())
    assert len(blocks_of(loaded)) == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], whole(**inputs)[0], atol=0, rtol=0)


def test_explain_names_the_layers_and_the_groups() -> None:
    torch.manual_seed(0)
    packed = compress(prune(llama()), measure=False)
    said = explain(packed, IDS)
    assert sorted(path for path, _ in said) == sorted(
        path for path, m in packed.named_modules() if hasattr(m, "computed_with")
    )
    assert ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.down_proj") in said.together  # fmt: skip
    assert "computed in one call: model.layers.0.self_attn.q_proj, " in str(said)
    assert "computed in one call: model.layers.*.mlp.gate_proj" in str(report_of(packed))


@pytest.mark.parametrize("faster", [True, False])
def test_compress_joins_what_is_measured_faster(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    class Took:
        def __init__(self, median: float) -> None:
            self.median = median

    def timed(ways: dict[str, Callable[[], object]], budget: float) -> dict[str, Took]:
        for way in ways.values():
            way()
        return {"apart": Took(2.0), "together": Took(1.0 if faster else 3.0)}

    monkeypatch.setattr(together, "time_ways", timed)
    model = compress(prune(llama()), measure=False)
    for module in model.modules():
        if hasattr(module, "computed_with"):
            module.computed_with = None
    found = together.join(model, (1, 16))
    assert len(found) == (4 if faster else 0)
    assert len(blocks_of(model)) == len(found)


@pytest.mark.parametrize("form", [form for form, layers in FORMS.items() if layers])
def test_a_layer_of_a_block_gives_its_own_product_to_whoever_looks(form: str) -> None:
    torch.manual_seed(0)
    model = prune(nn.Sequential(Block(form)))
    packed = compress(model, measure=False)
    apart = compress(model, measure=False, fuse=False)
    apart_fused = compress(model, measure=False)
    for module in apart_fused.modules():
        unwatch(module)
    (chain,) = blocks_of(packed)
    paths = [path for path, m in packed.named_modules() if m in chain.layers]
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        want = apart(x)
        for path in paths:  # called alone
            layer, single = packed.get_submodule(path), apart_fused.get_submodule(path)
            given = torch.randn(3, layer.in_features)
            assert torch.equal(layer(given), single(given))
        for path in paths:  # looked at, and no longer
            seen: list[Any] = []
            hook = packed.get_submodule(path).register_forward_hook(
                lambda module, args, y, seen=seen: seen.append((args[0], y))
            )
            torch.testing.assert_close(packed(x), want, atol=1e-6, rtol=1e-5)
            hook.remove()
            assert torch.equal(seen[0][1], apart_fused.get_submodule(path)(seen[0][0]))
        with pytest.raises(CompressError):  # a call that fails leaves nothing behind
            packed(torch.randn(2, 3, 31))
        assert not chain._inside
        torch.testing.assert_close(packed(x), want, atol=1e-6, rtol=1e-5)


def test_threads_copies_and_pickles_of_joined_blocks() -> None:
    torch.manual_seed(0)
    packed = compress(prune(nn.Sequential(Block("gated"), Block("gated"))), measure=False)
    inputs = [torch.randn(2, 3, 32) for _ in range(8)]
    with torch.no_grad():
        want = [packed(x) for x in inputs]
    again = [packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    for model in again:
        assert len(blocks_of(model)) == 2
        assert len({id(m) for b in blocks_of(model) for m in b.layers}) == 6

        def run(x: Tensor, model: Any = model) -> Tensor:
            with torch.no_grad():
                return [model(x) for _ in range(20)][-1]

        with ThreadPoolExecutor(4) as pool:
            for got, y in zip(pool.map(run, inputs), want, strict=True):
                assert torch.equal(got, y)
    dense = decompress(packed)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    assert all(m._forward_pre_hooks for m in packed.children())


def test_a_compiler_and_an_export_see_single_products() -> None:
    torch.manual_seed(0)
    model = prune(nn.Sequential(Block("gated"), Attention()))
    packed = compress(model, measure=False)
    x = torch.randn(4, 32)
    with torch.no_grad():
        want = packed(x)
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want, atol=1e-6, rtol=1e-5)
        program = torch.export.export(packed, (x,))
        torch.testing.assert_close(program.module()(x), want, atol=1e-6, rtol=1e-5)
        rows = torch.randn(3, 4, 32)
        torch.testing.assert_close(torch.vmap(packed)(rows), packed(rows), atol=1e-6, rtol=1e-5)
