"""Hand-off to other runtimes: the int8 graph keeps the pattern, and 2:4 goes to torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nmflow
from networks_of_hf import MODELS
from nmflow.errors import CompressError
from nmflow.packed import compress
from pruned import prune

onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")


def mlp(pattern: str = "1:8") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data *= nmflow.mask(layer.weight, pattern)  # pyright: ignore
    return model


def graph(path: Path) -> tuple[dict[str, np.ndarray], list[Any]]:
    made = onnx.load(path).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in made.initializer}, list(made.node)


def weights_of(path: Path) -> list[np.ndarray]:
    """The int8 matrices and filters, behind a DequantizeLinear each, and their scales."""
    tensors, nodes = graph(path)
    found = []
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            q = tensors[node.input[0]]
            if q.ndim > 1:
                assert q.dtype == np.int8
                if len(node.input) > 2:
                    assert not tensors[node.input[2]].any()  # no offset: zero is zero
                found.append(q)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_int8_weights_are_the_rounded_ones_and_hold_the_pattern(
    packed: bool, tmp_path: Path
) -> None:
    model = mlp()
    given = compress(model, measure=False) if packed else model
    calibration = [torch.randn(8, 64) for _ in range(4)]
    path = nmflow.export_onnx_int8(
        given, torch.randn(2, 64), tmp_path / "a.onnx", calibration=calibration
    )
    found = weights_of(path)
    assert len(found) == 2
    for layer in (model[0], model[2]):
        w = layer.weight.detach()  # pyright: ignore
        s = w.abs().amax(1, keepdim=True) / 127
        want = (w / s).round().clamp(-127, 127).to(torch.int8)
        got = [torch.from_numpy(q) for q in found]
        got = [q for q in got if want.shape in (q.shape, q.t().shape)]
        near = [q if q.shape == want.shape else q.t() for q in got]
        assert min(int((q.int() - want.int()).abs().max()) for q in near) <= 1
        best = min(near, key=lambda q: int((q.int() - want.int()).abs().max()))
        assert nmflow.holds(best.float(), "1:8")
        assert not best[w == 0].any()
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]
    assert len([n for n in graph(path)[1] if n.op_type == "QuantizeLinear"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_int8_networks_of_transformers(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = prune(make()).eval()
    path = nmflow.export_onnx_int8(model, inputs, tmp_path / "net.onnx")
    assert len(weights_of(path)) >= 12


def test_openvino_reads_the_int8_graph(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino", reason="openvino is not installed")
    model = mlp()
    x = torch.randn(4, 64)
    path = nmflow.export_onnx_int8(model, x, tmp_path / "a.onnx", calibration=[torch.randn(64, 64)])
    core = ov.Core()
    for options in ({}, {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}):
        compiled = core.compile_model(core.read_model(path), "CPU", options)
        got = torch.from_numpy(compiled(x.numpy())[0])
        want = model(x)
        assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_mistakes_are_named(tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    for calibration, said in (
        ([], "calibration is empty"), ([(x, x)], "an input of 2 tensors and the network takes 1"),
        ([x * 1e-6], "differs from .* by .* of its largest value"),
    ):  # fmt: skip
        with pytest.raises(CompressError, match=said):
            nmflow.export_onnx_int8(mlp(), x, tmp_path / "a.onnx", calibration=calibration)
    assert not list(tmp_path.iterdir())
    for model, said in (
        (mlp("2:4"), "its weight is torch.float32: call model.half"),
        (mlp("2:4").half(), "is not a multiple of 64"),
        (nn.Linear(64, 64).half(), "does not hold 2:4"),
        (nn.ReLU(), "it has no nn.Linear"),
        (compress(mlp(), measure=False), "model is packed"),
    ):
        with pytest.raises(CompressError, match=said):
            nmflow.to_semi_structured(model)
    held = nn.Linear(64, 64).half()
    held.weight.data *= nmflow.mask(held.weight, "2:4")
    with pytest.raises(CompressError, match="move the model to CUDA"):
        nmflow.to_semi_structured(held)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse tensor cores need CUDA")
def test_two_of_four_runs_on_sparse_tensor_cores() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).cuda().half()
    model[0].weight.data *= nmflow.mask(model[0].weight, "2:4")  # pyright: ignore
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    want = model(x)
    assert nmflow.to_semi_structured(model) == ["0"]
    torch.testing.assert_close(model(x), want, atol=1e-2, rtol=1e-2)
