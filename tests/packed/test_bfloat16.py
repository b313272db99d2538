"""`compress(dtype="bfloat16")`: float32 networks whose packed layers multiply in bfloat16."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from nmflow import mask
from nmflow.cli import app
from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import explain
from nmflow.packed import (
    compress,
    decompress,
    export_onnx,
    export_program,
    load,
    load_state,
    report_of,
    save,
)
from nmflow.packed.bfloat16 import BFloat16Linear
from pruned import prune
from rounded import MODULES, edit, first, net

HALF, FULL = torch.bfloat16, torch.float32


def half_pruned() -> nn.Linear:
    layer = nn.Linear(32, 48)
    layer.weight.data[:24] = prune(nn.Sequential(nn.Linear(32, 24)))[0].weight.data
    return layer


def layers(model: nn.Module) -> list[BFloat16Linear]:
    """The layers that multiply in bfloat16."""
    return [m for m in model.modules() if isinstance(m, BFloat16Linear)]


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 33])
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "1:16", "3:7", "1:8@4"])
def test_a_layer_is_the_masked_dense_one_computed_alike(pattern: str, tokens: int) -> None:
    """x, W and b rounded to bfloat16, sums of float32 or more, y rounded to bfloat16."""
    torch.manual_seed(0)
    dense = nn.Linear(112, 40)
    dense.weight.data *= mask(dense.weight, pattern)
    packed: Any = compress(nn.Sequential(dense), pattern, measure=False, dtype="bfloat16")
    x = torch.randn(tokens, 112)
    weight, bias = dense.weight.to(HALF).double(), dense.bias.to(HALF).double()
    with torch.no_grad():
        y = packed(x)
        exact = x.to(HALF).double() @ weight.T + bias
    assert y.dtype is FULL
    assert torch.equal(y.to(HALF).float(), y)  # y is what bfloat16 holds
    # One rounding of the result: half a step of 8 bits, and the error of float32 sums.
    near = exact.abs() * 2.0**-8 + 1e-5
    assert bool(((y.double() - exact).abs() <= near).all())
    assert torch.equal(decompress(packed)[0].weight, dense.weight.to(HALF).float())


@pytest.mark.parametrize("name", MODULES)
def test_modules_beside_their_dense_selves(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    model = prune(nn.Sequential(make()))
    packed = compress(model, measure=False, dtype="bfloat16")
    assert layers(packed)
    for row in report_of(packed).packed:
        assert row.error is not None
        assert 0 < row.error < 0.01
        assert "in bfloat16" in row.why
        assert row.bytes < 0.6 * row.dense_bytes
    x = torch.randn(shape)
    dense = decompress(packed)
    assert all(parameter.dtype is FULL for parameter in dense.parameters())
    with torch.no_grad():
        y, exact = first(packed(x)), first(model(x))
        assert y.dtype is FULL
        assert 0 < float((y - exact).norm() / exact.norm()) < 0.02
        save(packed, tmp_path)
        again = load(tmp_path, nn.Sequential(make()))
        assert torch.equal(first(again(x)), y)
    for a, b in zip(layers(packed), layers(again), strict=True):
        assert a.dtype is b.dtype is FULL
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.codes, b.codes)
    held = dict(dense.named_parameters())
    state = load_state(tmp_path)
    assert state.keys() == held.keys()
    assert all(torch.equal(state[n], p) for n, p in held.items())


def test_a_whole_network_in_its_folder(tmp_path: Path) -> None:
    """By the calls of transformers, and by `nmflow compress --dtype bfloat16`."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    prune(model.bert.encoder)
    packed = compress(model, measure=False, dtype="bfloat16")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        want = packed(tokens).logits
        packed.save_pretrained(tmp_path / "packed")
        kind = transformers.AutoModelForSequenceClassification
        again = kind.from_pretrained(tmp_path / "packed")
        assert torch.equal(again(tokens).logits, want)
        model.save_pretrained(tmp_path / "dense")
        given = ["compress", str(tmp_path / "dense"), "-o", str(tmp_path / "cli")]
        done = CliRunner().invoke(app(), [*given, "--dtype", "bfloat16"])
        assert done.exit_code == 0, done.output
        assert "in bfloat16" in done.output.replace("\n", " ")
        assert torch.equal(kind.from_pretrained(tmp_path / "cli")(tokens).logits, want)
    assert layers(again)
    assert want.dtype is FULL


def test_what_a_packed_module_survives() -> None:
    packed = compress(net(), measure=False, dtype="bfloat16")
    x = torch.randn(5, 32)
    with torch.no_grad():
        y = packed(x)
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
            assert torch.equal(twin(x), y)
        fresh = compress(net(), measure=False, dtype="bfloat16")
        fresh.load_state_dict(packed.state_dict())
        assert torch.equal(fresh(x), y)
        fresh.load_state_dict(packed.state_dict(), assign=True)
        assert torch.equal(fresh(x), y)
        fresh.load_state_dict(compress(net(), measure=False).state_dict())  # rounded on its way
        assert torch.equal(fresh(x), y)
        for dtype in (HALF, torch.float16, torch.float64):
            other = copy.deepcopy(packed).to(dtype)
            assert other[0].weight.dtype == other(x.to(dtype)).dtype == dtype
            assert torch.equal(other[0].values, packed[0].values)
            assert torch.equal(other.float()[0].weight + 0, packed[0].weight + 0)
        for autocast in (HALF, torch.float16):
            with torch.autocast("cpu", autocast):
                assert packed(x).dtype == autocast
        assert copy.deepcopy(packed).to("meta")(x.to("meta")).shape == (5, 32)
    with pytest.raises(CompressError, match=r"x is torch\.float64 and the packed layer"):
        packed(x.double())
    assert "multiplies in bfloat16" in str(packed)
    assert packed[0].weight.dtype is FULL


def test_gradients_compilers_and_exports(tmp_path: Path) -> None:
    packed = compress(net(), measure=False, dtype="bfloat16", fuse=False)
    x = torch.randn(5, 32, requires_grad=True)
    packed(x).sum().backward()
    got, x.grad = x.grad, None
    decompress(packed)(x).sum().backward()
    assert got is not None
    assert x.grad is not None
    assert got.dtype is FULL
    assert float((got - x.grad).norm() / x.grad.norm()) < 0.02
    assert packed[0].bias.grad is not None
    with torch.no_grad():
        y = packed(x)
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), y)
        assert torch.equal(torch.fx.symbolic_trace(packed)(x), y)
        program = export_program(packed, x.detach(), packed=True)
        assert torch.equal(program.module()(torch.cat([x, x]))[:5], y)
    assert "bfloat16 on cpu" in str(explain(packed, x.detach()))
    with pytest.raises(CompressError, match="so compress without dtype"):
        export_onnx(packed, x.detach(), tmp_path / "a.onnx", packed=True)


def test_a_fused_activation_and_rows_that_are_dense() -> None:
    packed = compress(net(), measure=False, dtype="bfloat16")
    assert report_of(packed).fused == ["0"]
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), net()(x), rtol=0.05, atol=0.02)
        layer = half_pruned()
        rows = compress(nn.Sequential(layer), measure=False, dtype="bfloat16")
        assert len(layers(rows)) == 1
        assert torch.equal(rows(x)[:, 24:], x @ layer.weight[24:].T + layer.bias[24:])


def test_what_compress_refuses_and_leaves() -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16: it must be 'bfloat16'"),
        ({"dtype": "bfloat16", "values": "int8"}, "pass one"),
    )
    for arguments, said in refused:
        with pytest.raises(CompressError, match=said):
            compress(net(), measure=False, **arguments)
    double = report_of(compress(net().double(), measure=False, dtype="bfloat16"))
    assert "float64 is not rounded" in double[0].why
    large = net()
    large[0].weight.data[0, large[0].weight[0].nonzero()[0]] = 3.4e38
    assert "too large for bfloat16" in report_of(
        compress(large, measure=False, dtype="bfloat16")
    )[0].why  # fmt: skip
    half = compress(net().bfloat16(), measure=False, dtype="bfloat16")
    assert not layers(half)  # it multiplies in bfloat16 as it is
    assert half[0].values.dtype is HALF


def test_the_choice_is_measured_against_dense_bfloat16() -> None:
    torch.manual_seed(0)
    layer = prune(nn.Sequential(nn.Linear(256, 256)), "1:16")
    report = report_of(compress(layer, dtype="bfloat16", tokens=(16,)))
    assert report[0].times[16][2] in ("F.linear", "oneDNN", "oneDNN packed", "oneDNN bfloat16")


EDITS: dict[str, tuple[str, Callable[[dict, dict], None]]] = {
    "the version of files without": ("layout version", lambda h, d: h.update(layout=1)),
    "another kind": (
        "of an impossible kind",
        lambda h, d: h["weights"]["0.weight"]["parts"][0].update(values="int4"),
    ),
    "a kind that is no text": (
        "of an impossible kind",
        lambda h, d: h["weights"]["0.weight"]["parts"][0].update(values=["bfloat16"]),
    ),
    "no kind": (
        "of another dtype",
        lambda h, d: h["weights"]["0.weight"]["parts"][0].pop("values"),
    ),
    "a kind that the parameter has": (
        "of an impossible kind",
        lambda h, d: h["weights"]["0.weight"].update(dtype="bfloat16"),
    ),
    "8-bit by name": (
        "of another dtype",
        lambda h, d: h["weights"]["0.weight"]["parts"][0].update(values="int8"),
    ),
    "float16 by content": (
        "of another dtype",
        lambda h, d: d.update({"0.weight#0.values": d["0.weight#0.values"].half()}),
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    said, change = EDITS[name]
    save(compress(net(), measure=False, dtype="bfloat16"), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(FileFormatError, match=said):
        load(tmp_path, net())
