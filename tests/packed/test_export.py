"""Export: the masked dense network as ONNX and as a program, checked against the model."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import nmflow
from networks_of_hf import MODELS
from nmflow import mask
from nmflow.errors import CompressError
from nmflow.packed import compress, export_onnx, export_program
from pruned import prune


def network() -> Any:
    model = cast(Any, nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)).eval())
    for layer in (model[0], model[2]):
        layer.weight.data *= mask(layer.weight, "1:8")
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_programs_take_any_batch(packed: bool) -> None:
    model = network()
    program = export_program(compress(model, measure=False), torch.randn(3, 32), packed=packed)
    ops = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert ("nmflow.matmul.default" in ops) == packed
    for batch in (1, 2, 9):
        x = torch.randn(batch, 32)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)


def test_onnx_of_a_packed_network_and_of_vit(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = network()
    path = export_onnx(compress(model, measure=False), torch.randn(3, 32), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(7, 32)
    got = cast(Any, session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    np.testing.assert_allclose(got, model(x).detach().numpy(), atol=1e-5)
    zeros = [
        (onnx.numpy_helper.to_array(t) == 0).mean()
        for t in onnx.load(path).graph.initializer
        if len(t.dims) == 2
    ]
    assert zeros == [0.875, 0.875]  # the masked dense weights
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    vit = ViTForImageClassification(config).eval()
    for name, p in vit.named_parameters():
        if p.ndim == 2 and ".layer" in name:
            p.data *= mask(p, "1:8")
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    path = export_onnx(compress(vit, measure=False), example, tmp_path / "vit.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 16, 16)
    got = cast(Any, session.run(None, {"pixel_values": images.numpy()})[0])
    with torch.no_grad():
        np.testing.assert_allclose(got, vit(images).logits.numpy(), atol=1e-4)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.onnx", "vit.onnx"]


def test_an_export_that_disagrees_is_an_error(tmp_path: Path) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + torch.rand(1)

    with pytest.raises(CompressError, match="differs"):
        export_program(Random(), torch.randn(3, 32))

    class Branches(Random):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else -self.net(x)

    with pytest.raises(CompressError, match="cannot be exported") as caught:
        export_onnx(Branches(), torch.randn(3, 32), tmp_path / "b.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_folders_and_packages_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gone = torch.randn(3, 32), tmp_path / "no" / "a.onnx"
    for export in (partial(export_onnx, verify=False), nmflow.export_onnx_int8):
        with pytest.raises(CompressError, match="cannot be written"):
            export(network(), x, gone)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    old = export_onnx(network(), x, tmp_path / "a.onnx", verify=False).read_bytes()
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full)
    for export in (export_onnx, nmflow.export_onnx_int8):
        with pytest.raises(CompressError, match=r"a.onnx' cannot be written.*No space"):
            export(network(), x, tmp_path / "a.onnx")
        assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]
        assert (tmp_path / "a.onnx").read_bytes() == old
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CompressError, match=r"pip install 'nmflow\[onnx\]'"):
        export_onnx(network(), torch.randn(3, 32), tmp_path / "a.onnx")


CACHES = ("gpt2", "llama", "qwen2", "t5", "bert", "vit")
ONE_A_KIND = [pytest.param(n, marks=pytest.mark.slow) if n == "qwen2" else n for n in CACHES]


@pytest.mark.parametrize("name", ONE_A_KIND)
def test_networks_that_keep_a_cache_are_exported_without_it(name: str) -> None:
    make, inputs = MODELS[name]
    model = prune(make())
    flag = getattr(model.config, "use_cache", None)
    program = export_program(compress(model, measure=False), inputs, packed=name == "llama")
    assert getattr(model.config, "use_cache", None) == flag
    more = {key: torch.cat([value, value]) for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(**more)[0], model(**more)[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_networks_that_keep_a_cache_as_onnx(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model = prune(make())
    export_onnx(compress(model, measure=False), inputs, tmp_path / "a.onnx")  # which compares
    attention = getattr(model.config, "_attn_implementation", None)
    assert attention == getattr(make().config, "_attn_implementation", None)
    assert getattr(model.config, "use_cache", None) == getattr(make().config, "use_cache", None)


def test_a_packed_network_compiles_after_its_export() -> None:
    packed = compress(network(), measure=False)
    x = torch.randn(3, 32)
    program = export_program(packed, x, packed=True)
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = packed(x)
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(program.module()(x), want)
    torch._dynamo.reset()
