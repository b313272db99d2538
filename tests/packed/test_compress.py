"""`compress`: every kind of module against its masked dense self in float64."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import nmflow
from nmflow import mask
from nmflow.errors import CompressError, PlanError
from nmflow.kernels import matmul
from nmflow.packed import compress, decompress, export_program, load, report_of, save
from nmflow.packed.convolution import PackedConv
from nmflow.packed.modules import FusedLinear, PackedLinear
from pruned import NETWORKS, Attend, flat, prune, vit

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "PackedLinear"


CASES = {
    "linear": Case(lambda: nn.Linear(32, 24), (5, 32)),
    "linear without bias": Case(lambda: nn.Linear(32, 24, bias=False), (2, 3, 32)),
    "Conv1D of HF": Case(lambda: Conv1D(24, 32), (2, 3, 32)),
    "conv 1x1": Case(lambda: nn.Conv2d(32, 24, 1), (2, 32, 5, 6), "PackedConv"),
    "conv 1x1 stride": Case(
        lambda: nn.Conv2d(32, 24, 1, 2, bias=False), (2, 32, 5, 6), "PackedConv"
    ),
    "conv 3x3": Case(lambda: nn.Conv2d(16, 24, 3, 1, 1), (2, 16, 5, 6), "PackedConv"),
    "conv odd": Case(
        lambda: nn.Conv2d(16, 9, (3, 2), (2, 1), (0, 1), (1, 2)), (2, 16, 9, 7), "PackedConv"
    ),
    "conv same reflect": Case(
        lambda: nn.Conv2d(16, 8, 3, padding="same", padding_mode="reflect"),
        (16, 7, 7),
        "PackedConv",
    ),
    "conv 1d": Case(lambda: nn.Conv1d(16, 8, 5, 2, 2), (2, 16, 12), "PackedConv"),
    "conv 3d": Case(lambda: nn.Conv3d(16, 8, 2, 2), (1, 16, 4, 4, 6), "PackedConv"),
    "attention": Case(Attend, (7, 2, 32), "PackedAttention"),
    "attention batch first": Case(lambda: Attend(batch_first=True), (2, 7, 32), "PackedAttention"),
    "attention unbatched": Case(Attend, (7, 32), "PackedAttention"),
    "attention other sizes": Case(
        lambda: Attend(kdim=16, vdim=24, bias=False), (7, 2, 32), "PackedAttention"
    ),
    "attention without biases": Case(lambda: Attend(bias=False), (7, 2, 32), "PackedAttention"),
    "attention extras": Case(
        lambda: Attend(add_bias_kv=True, add_zero_attn=True), (7, 2, 32), "PackedAttention"
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_modules_against_float64(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = prune(nn.Sequential(case.make()).to(dtype))
    packed = compress(model, measure=False)
    assert case.kind in {type(m).__name__ for m in packed.modules()}
    assert len(report_of(packed).packed) == sum(row.pattern != "" for row in report_of(packed))
    x = torch.randn(case.shape).to(dtype)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        got = packed(x)
        plain = got[0] if isinstance(got, tuple) else got
        assert plain.shape == (want[0] if isinstance(want, tuple) else want).shape
    torch.testing.assert_close(flat(got), flat(want), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    back = decompress(packed)
    assert str(back) == str(model)
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert [p.requires_grad for p in back.parameters()] == [True] * len(list(model.parameters()))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "Attention" not in case.kind])
def test_a_graph_of_fx_holds_the_product_as_one_call(name: str) -> None:
    case = CASES[name]
    packed = compress(prune(nn.Sequential(case.make())), measure=False)
    graph = torch.fx.symbolic_trace(packed)
    assert sum(node.target is matmul for node in graph.graph.nodes) == 1
    for more in (0, 3):  # the graph holds no size
        x = torch.randn(*case.shape[:-1], case.shape[-1] + (more if "conv " in name else 0))
        assert torch.equal(graph(x), packed(x))


@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_state_dicts(name: str) -> None:
    case = CASES[name]
    packed = compress(prune(nn.Sequential(case.make())), measure=False)
    x = torch.randn(case.shape)
    want = flat(packed(x))
    assert torch.equal(flat(copy.deepcopy(packed)(x)), want)
    assert torch.equal(flat(pickle.loads(pickle.dumps(packed))(x)), want)
    other = compress(prune(nn.Sequential(case.make())), measure=False)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(flat(other(x)), want)
    narrow = copy.deepcopy(packed).to(torch.bfloat16)
    again = narrow.to(torch.float32)
    torch.testing.assert_close(flat(again(x)), want, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(
    "how", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}], ids=str
)
def test_masks_of_attention(how: dict[str, bool]) -> None:
    model = prune(nn.MultiheadAttention(32, 4, batch_first=True, **how))
    packed = compress(model, measure=False)
    x = torch.randn(2, 5, 32)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    heads = torch.randn(8, 5, 5)
    for kwargs in (
        {"key_padding_mask": padding},
        {"attn_mask": causal},
        {"attn_mask": heads, "key_padding_mask": torch.randn(2, 5)},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "is_causal": True, "need_weights": True},
        {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
        # A hint that is not true: torch believes it.
        {"attn_mask": heads, "is_causal": True, "need_weights": False},
        {"need_weights": True, "average_attn_weights": False},
    ):
        a, b = model(x, x, x, **kwargs), packed(x, x, x, **kwargs)
        torch.testing.assert_close(b[0], a[0], atol=1e-5, rtol=1e-5)
        assert (a[1] is None) == (b[1] is None)
        if a[1] is not None:
            torch.testing.assert_close(b[1], a[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(CompressError, match="attn_mask"):
        packed(x, x, x, is_causal=True)


def test_transformer_encoder_leaves_its_fused_path_and_finds_it_again() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = prune(nn.TransformerEncoder(layer, 2))
    packed = compress(model, measure=False)
    x = torch.randn(2, 5, 32)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), atol=1e-5, rtol=1e-5)
        a = packed(x, src_key_padding_mask=padding)[~padding]
        b = model(x, src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    back = decompress(packed)
    assert back.layers[0].activation_relu_or_gelu == 1  # pyright: ignore
    assert back.use_nested_tensor == model.use_nested_tensor


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_hf(name: str) -> None:
    make, inputs, at = NETWORKS[name]
    model = prune(make())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    packed = compress(model, measure=False)
    assert len(report_of(packed).packed) >= 8
    with torch.no_grad():
        torch.testing.assert_close(packed(**inputs)[at], model(**inputs)[at], atol=1e-4, rtol=1e-4)
    for key, value in model.state_dict().items():  # compress leaves its input alone
        assert torch.equal(value, before[key])
    back = decompress(packed)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in before.items())


def test_fused_qkv_by_rows() -> None:
    model = cast(Any, nn.Sequential(nn.Linear(32, 96)))
    w = model[0].weight.data
    w[:32] *= mask(w[:32], "1:16")
    w[32:64] *= mask(w[32:64], "1:4")
    packed = compress(model, measure=False)
    fused = packed[0]
    assert isinstance(fused, FusedLinear)
    assert [type(p).__name__ for p in fused.parts] == ["PackedLinear", "PackedLinear", "Linear"]
    assert report_of(packed)[0].pattern == "1:16 [0:32], 1:4 [32:64]"
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(packed(x), model(x), atol=1e-5, rtol=1e-5)
    back = decompress(packed)
    assert torch.equal(back[0].weight, model[0].weight)
    assert torch.equal(back[0].bias, model[0].bias)
    assert torch.equal(fused.weight, model[0].weight)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 0.075), (torch.bfloat16, 0.08), (torch.float16, 0.08)]
)
def test_bytes_in_memory(dtype: torch.dtype, limit: float) -> None:
    model = prune(nn.Sequential(nn.Linear(768, 3072, bias=False)).to(dtype), "1:16")
    packed = compress(model, measure=False)
    held = sum(b.nbytes for b in packed.buffers())
    dense = model[0].weight.nbytes
    assert held <= limit * dense
    assert report_of(packed)[0].bytes == held


def test_half_a_convolution_stays_dense_and_files_hold_it_all_the_same(tmp_path: Path) -> None:
    model = prune(nn.Sequential(nn.Conv2d(16, 8, 3), nn.Linear(32, 8)))
    model[0].weight.data[4:] = torch.randn(4, 16, 3, 3)
    packed = compress(model, measure=False)
    assert report_of(packed)[0].kept == "dense"
    assert report_of(packed)[0].why == "only some filters of the convolution hold a pattern"
    save(model, tmp_path)
    again = load(tmp_path, nn.Sequential(nn.Conv2d(16, 8, 3), nn.Linear(32, 8)))
    assert torch.equal(again.get_parameter("0.weight"), model[0].weight)
    assert isinstance(again[1], PackedLinear)


def test_a_report_of_its_own_is_left_to_a_model() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.report = nn.Linear(32, 8)

    packed = compress(prune(Own()), measure=False)
    assert isinstance(packed.report, PackedLinear)
    assert report_of(packed)[0].kept == "packed"
    for other in (decompress(packed), Own()):
        with pytest.raises(CompressError, match="model is a Own without a report"):
            report_of(other)


def test_inplace_and_shared_modules() -> None:
    shared = nn.Linear(32, 32)
    model = prune(nn.Sequential(shared, nn.ReLU(), shared))
    x = torch.randn(3, 32)
    want = model(x)
    packed = compress(model, measure=False)
    assert packed[0] is packed[2]
    assert model[0] is shared
    same = compress(model, measure=False, inplace=True)
    assert same is model
    assert isinstance(model[0], PackedLinear)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), want)
    decompress(model, inplace=True)
    torch.testing.assert_close(model(x), want)
    root = compress(prune(nn.Linear(32, 32)), measure=False)
    assert isinstance(root, PackedLinear)


def test_the_weight_of_a_packed_layer() -> None:
    model = prune(nn.Sequential(nn.Linear(32, 24), nn.Conv2d(16, 8, 3)))
    packed = compress(model, measure=False)
    weight = packed[0].weight
    assert (weight.shape, weight.dtype, weight.device) == (
        model[0].weight.shape, torch.float32, torch.device("cpu"),
    )  # fmt: skip
    assert torch.equal(weight + 0, model[0].weight)
    assert torch.equal(torch.nn.functional.linear(torch.eye(32), weight), model[0].weight.t())
    with pytest.raises(CompressError, match="read-only"):
        weight.zero_()
    assert isinstance(packed[1], PackedConv)
    assert torch.equal(packed[1].weight, model[1].weight)


def test_damaged_state_dicts_are_refused_whole() -> None:
    packed = compress(prune(nn.Sequential(nn.Linear(36, 24)), "1:12"), measure=False)
    good = {k: v.clone() for k, v in packed.state_dict().items()}
    x = torch.randn(3, 36)
    want = packed(x)
    for change in (
        {"0.codes": good["0.codes"] | 0x0F},  # column 15 of a group of 12
        {"0.codes": good["0.codes"][:-1]},
        {"0.values": good["0.values"].double()[..., :-1]},
    ):
        with pytest.raises(RuntimeError, match=r"0\.values, 0\.codes"):
            packed.load_state_dict({**good, **change})
        assert torch.equal(packed(x), want)
    with pytest.raises(RuntimeError, match="together"):
        packed.load_state_dict({k: v for k, v in good.items() if k != "0.codes"})


def test_training_biases_and_inputs_through_a_packed_network() -> None:
    model = prune(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)))
    packed = compress(model, measure=False)
    x = torch.randn(4, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    packed(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[0].bias.grad, model[0].bias.grad, atol=1e-5, rtol=1e-5)


def test_choice_of_weights() -> None:
    model = cast(Any, vit())
    for name, parameter in model.named_parameters():
        if ".layer" in name and parameter.ndim == 2:
            parameter.data *= mask(parameter, "1:8")
    ff = report_of(compress(model, include="ff", measure=False))
    assert all("mlp" in r.name or "intermediate" in r.name or "output.dense" in r.name
               or "fc" in r.name for r in ff.packed)  # fmt: skip
    assert 0 < len(ff.packed) < len(report_of(compress(model, measure=False)).packed)
    none = report_of(compress(model, "2:8", include="ff", measure=False))
    assert {r.pattern for r in none.packed} == {"2:8"}
    some = report_of(compress(model, {"qk": "1:8"}, measure=False))
    assert len(some.packed) == 4
    rest = report_of(compress(model, exclude="qk", measure=False))
    assert len(rest.packed) + 4 == len(report_of(compress(model, measure=False)).packed)


BAD = {
    "dense": (lambda m: compress(m), "no N:M weight"),
    "tokens empty": (lambda m: compress(m, tokens=()), "tokens is"),
    "tokens zero": (lambda m: compress(m, tokens=(0, 1)), "tokens is"),
    "pattern": (lambda m: compress(m, "0:4"), "N"),
    "preset": (lambda m: compress(m, include="nothing*"), "nothing"),
    "not held": (lambda m: compress(prune(m), "1:16"), "does not hold 1:16"),
    "not packed": (lambda m: decompress(m), "no packed module"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_sentence_and_change_nothing(name: str) -> None:
    call, said = BAD[name]
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises((CompressError, PlanError, ValueError), match=said) as caught:
        call(model)
    assert type(caught.value).__module__ == "nmflow.errors"
    assert isinstance(model[0], nn.Linear)


def test_wrong_dtype_at_run_time_says_the_mend() -> None:
    packed = compress(prune(nn.Sequential(nn.Linear(32, 32))), measure=False)
    with pytest.raises(CompressError, match=r"packed\.to\(dtype\)"):
        packed(torch.randn(2, 32).bfloat16())


def test_a_model_that_cannot_be_copied_is_compressed_in_place() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    model[0].weight.data *= mask(model[0].weight, "1:16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's old weight_norm is deprecated
        torch.nn.utils.weight_norm(model[1])
    model(torch.randn(2, 32))
    with pytest.raises(CompressError, match=r"model cannot be copied .*inplace=True"):
        compress(model, measure=False)
    x = torch.randn(2, 32)
    y = model(x)
    torch.testing.assert_close(compress(model, measure=False, inplace=True)(x), y)


def test_a_sharded_network_is_gathered_before_it_is_packed(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = prune(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))).eval()
    x = torch.randn(2, 64)
    model = copy.deepcopy(plain)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded: Any = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for state in ("sharded", "not sharded at the moment"):
            for call in (
                compress,
                lambda m: save(m, tmp_path / "packed"),
                lambda m: export_program(m, x),
                lambda m: nmflow.export_onnx(m, x, tmp_path / "a.onnx"),
                lambda m: nmflow.export_onnx_int8(m, x, tmp_path / "a.onnx"),
                lambda m: nmflow.export_decoder(m, tmp_path / "a.onnx"),
                nmflow.to_semi_structured,
            ):
                with pytest.raises(CompressError, match="get_model_state_dict") as caught:
                    call(sharded)
                assert ("'0.weight' is a DTensor" in str(caught.value)) == (state == "sharded")
            sharded.unshard()
        assert [file.name for file in tmp_path.iterdir()] == ["store"]
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    finally:
        dist.destroy_process_group()
    again = copy.deepcopy(plain)
    again.load_state_dict(weights)
    packed = compress(again, measure=False)
    assert torch.equal(packed(x), compress(plain, measure=False)(x))
