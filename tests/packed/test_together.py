"""q, k and v in one call: the same results, and apart where that is right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import nmflow
from nmflow.kernels import explain
from nmflow.packed import compress, decompress, report_of, together
from nmflow.packed.measure import Timing
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
# Groups of q, k and v in a network. GPT-2 has one matrix for all three.
GROUPS: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "vit": (*NETWORKS["vit"][:2], 2),
    "t5": (*NETWORKS["t5"][:2], 2),
    "gpt2": (*NETWORKS["gpt2"][:2], 0),
    "bert": (bert, IDS, 2),
    "llama": (llama, IDS, 2),
}


def blocks_of(model: nn.Module) -> list[Any]:
    found = [getattr(m, "computed_with", None) for m in model.modules()]
    return [b for b in dict.fromkeys(found) if b is not None]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_networks_give_the_same(name: str, rounding: str) -> None:
    make, inputs, groups = GROUPS[name]
    torch.manual_seed(0)
    model = prune(make())
    whole = compress(model, measure=False, **ROUNDINGS[rounding])
    apart = compress(model, measure=False, fuse=False, **ROUNDINGS[rounding])
    assert len(report_of(whole).together) == len(blocks_of(whole)) == groups
    assert blocks_of(apart) == []
    # Hooks of a module would cost each of its calls more than joining gains.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.modules())
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


def test_siblings_give_their_own_products_to_whoever_looks(pair: tuple[Any, Any]) -> None:
    whole, apart = pair
    x = torch.randn(5, 32)
    with torch.no_grad():
        for name in "qkv":  # called alone
            assert torch.equal(getattr(whole, name)(x), getattr(apart, name)(x))
        for name in "qkv":  # looked at in a pass
            seen: list[Any] = []
            hook = getattr(whole, name).register_forward_hook(
                lambda module, args, y, seen=seen: seen.append(y.clone())
            )
            agree(whole, apart, x)
            hook.remove()
            assert torch.equal(seen[0], getattr(apart, name)(x))


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


@pytest.mark.parametrize("names", ["q", "qkv"])
@pytest.mark.parametrize("pair", ["int8 values", "int8"], indirect=True)
def test_siblings_that_multiply_otherwise_are_apart(pair: tuple[Any, Any], names: str) -> None:
    whole, apart = pair
    x = torch.randn(5, 32)
    agree(whole, apart, x)
    for model in pair:
        for name in names:
            layer = getattr(model, name)
            layer.activations = "int8" if layer.activations == "float" else "float"
    agree(whole, apart, x)


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
    assert len(blocks_of(loaded)) == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], whole(**inputs)[0], atol=0, rtol=0)


def test_explain_names_the_layers_and_the_groups() -> None:
    torch.manual_seed(0)
    packed = compress(prune(llama()), measure=False)
    said = explain(packed, IDS)
    assert sorted(path for path, _ in said) == sorted(
        path for path, m in packed.named_modules() if hasattr(m, "computed_with")
    )
    attention = "model.layers.0.self_attn"
    group = tuple(f"{attention}.{name}_proj" for name in "qkv")
    assert group in said.together
    assert f"computed in one call: {', '.join(group)}" in str(said)
    assert "computed in one call: model.layers.*.self_attn.q_proj" in str(report_of(packed))


@pytest.mark.parametrize("faster", [True, False])
def test_compress_joins_what_is_measured_faster(
    monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    def timed(ways: dict[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
        for way in ways.values():
            way()
        took = {"apart": 2.0, "together": 1.9 if faster else 1.99}  # 1.99 lies within the noise
        return {name: Timing(t, t, t, 1) for name, t in took.items()}

    monkeypatch.setattr(together, "time_ways", timed)
    model = compress(prune(llama()), measure=False)
    for module in model.modules():
        if hasattr(module, "computed_with"):
            module.computed_with = None
    found = together.join(model, (1, 16))
    assert len(found) == (2 if faster else 0)
    assert len(blocks_of(model)) == len(found)


def test_a_compiler_and_an_export_see_single_products() -> None:
    torch.manual_seed(0)
    packed = compress(prune(nn.Sequential(nn.Linear(32, 32), Attention())), measure=False)
    x = torch.randn(4, 32)
    with torch.no_grad():
        want = packed(x)
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want, atol=1e-6, rtol=1e-5)
        program = torch.export.export(packed, (x,))
        torch.testing.assert_close(program.module()(x), want, atol=1e-6, rtol=1e-5)
        rows = torch.randn(3, 4, 32)
        torch.testing.assert_close(torch.vmap(packed)(rows), packed(rows), atol=1e-6, rtol=1e-5)
