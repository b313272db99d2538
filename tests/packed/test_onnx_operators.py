"""Packed layers in onnxruntime: equal to the layer in torch, on its threads, refusals in words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nmflow
from networks_of_hf import MODELS
from nmflow import mask, native
from nmflow.errors import CompressError
from nmflow.kernels import reference
from nmflow.packed import compress, export_onnx, onnx_operators, onnxruntime_session_options
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.modules import PackedLinear
from nmflow.packed.onnx_operators import ATTRIBUTES
from pruned import prune

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

# Tails of rows and entries, spans of several groups, codes of four and eight bits, shared codes.
CASES = [
    ("2:4", 33, 36), ("1:4", 48, 96), ("1:8", 17, 64), ("1:16", 50, 64), ("1:32", 31, 96),
    ("3:7", 17, 49), ("8:256", 9, 512), ("1:16@16", 40, 64), ("2:8@32", 70, 64), ("4:8@3", 10, 32),
    ("1:1", 5, 3),
]  # fmt: skip


def layer_of(pattern: str, out: int, inputs: int, bias: bool = True) -> PackedLinear:
    w = torch.randn(out, inputs)
    made = PackedLinear.pack(
        torch.where(mask(w, pattern), w, 0.0),
        pattern,
        nn.Parameter(torch.randn(out)) if bias else None,
    )
    return made.requires_grad_(False)


def graph(layer: PackedLinear, **changed: Any) -> bytes:
    """A graph of one operator; `changed` replaces buffers or attributes."""
    held = {"values": layer.values, "codes": layer.codes, "bias": layer.bias}
    held |= {k: changed.pop(k) for k in list(changed) if k in held}
    loose = changed.pop("loose", ())  # buffers that are inputs of the graph, not initializers
    numbers = dict(zip(ATTRIBUTES[:5], layer.dims, strict=True))
    numbers |= {"epilogue": layer.epilogue} | changed
    return model_of("packed_linear", held, numbers, loose)


def model_of(
    name: str, held: dict[str, Any], numbers: dict[str, int], loose: Sequence[str] = ()
) -> bytes:
    names = ["x", *(own if t is not None else "" for own, t in held.items())]
    node = onnx.helper.make_node(name, names, ["y"], domain="nmflow", **numbers)
    real = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info(own, real, None) for own in ("x", *loose)]
    made = onnx.helper.make_graph(
        [node], "one", inputs, [onnx.helper.make_tensor_value_info("y", real, None)],
        [onnx.numpy_helper.from_array(t.numpy(), own)
         for own, t in held.items() if t is not None and own not in loose],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nmflow", 1)]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()


def session(model: bytes | Path, threads: int = 1) -> Any:
    options = onnxruntime_session_options(threads=threads)
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(made: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(made.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("pattern", "out", "inputs"), CASES)
def test_the_operator_is_the_layer(pattern: str, out: int, inputs: int, bias: bool) -> None:
    layer = layer_of(pattern, out, inputs, bias)
    w = layer.dense().double()
    b = None if layer.bias is None else layer.bias.double()
    for epilogue in range(5):
        layer.epilogue = epilogue
        made = session(graph(layer))
        for lead in [(1,), (7,), (2, 3), (49,), (), (0,), (3, 0), (1,) * 15]:
            x = torch.randn(*lead, inputs)
            y = run(made, x)
            want = nn.functional.linear(x.double(), w, b)
            want = reference.apply_epilogue(want, epilogue).float()
            assert y.shape == want.shape
            torch.testing.assert_close(y, want, atol=2e-5, rtol=2e-5)
            assert torch.equal(y, layer(x)), "the same kernels, so the same bits"


def graph_int8(layer: Int8Linear, **changed: Any) -> bytes:
    held = {"stream": layer.stream, "bias": layer.bias}
    held |= {k: changed.pop(k) for k in list(changed) if k in held}
    numbers = dict(zip(ATTRIBUTES[:5], layer.dims, strict=True))
    numbers |= {"epilogue": layer.epilogue, "activations": int(layer.activations == "int8")}
    return model_of("packed_linear_int8", held, numbers | changed)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("pattern", "out", "inputs"), CASES)
def test_the_operator_of_8_bit_values_is_the_layer(
    pattern: str, out: int, inputs: int, activations: str
) -> None:
    layer = Int8Linear.of(layer_of(pattern, out, inputs, pattern != "1:4"), activations)
    for epilogue in (0, 1, 3, 4, 2):
        layer.epilogue = epilogue
        made = session(graph_int8(layer))
        for lead in [(1,), (7,), (2, 3), (49,), (), (0,)]:
            x = torch.randn(*lead, inputs)
            y = run(made, x)
            assert torch.equal(y, layer(x)), "the same kernels, so the same bits"
    want = nn.functional.linear(x := torch.randn(5, inputs), layer.dense(), layer.bias).relu()
    off = 0.05 * float(want.abs().max()) if activations == "int8" else 1e-4
    torch.testing.assert_close(run(made, x), want, atol=off, rtol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"out_features": 64}, "bytes of the attributes"),
        ({"m": 3}, "no packed weight"),
        ({"activations": 2}, "activations is unknown"),
        ({"stream": torch.full((2, 320), 255, dtype=torch.uint8)}, "no packed weight"),
    ],
)
def test_what_is_no_weight_of_8_bit_values_makes_no_session(
    changed: dict[str, Any], said: str
) -> None:
    layer = Int8Linear.of(layer_of("2:8", 17, 16))
    session(graph_int8(layer))
    with pytest.raises(Exception, match=said):
        session(graph_int8(layer, **changed))


def test_threads_are_the_session_s_and_change_no_bit() -> None:
    layer = layer_of("1:4", 512, 256)
    one, two = session(graph(layer), 1), session(graph(layer), 2)
    for tokens in (1, 16, 300):
        x = torch.randn(tokens, 256)
        assert torch.equal(run(one, x), run(two, x))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"out_features": 64}, "bytes of the attributes"),
        ({"n": 0}, "no packed weight"),
        ({"m": 7}, "no packed weight"),
        ({"panel": -1}, "panel"),
        ({"in_features": 1 << 62}, "no packed weight"),
        ({"epilogue": 5}, "epilogue is unknown"),
        ({"codes": torch.full((2, 1, 16), -1, dtype=torch.int32)}, "no packed weight"),
        ({"values": torch.zeros(2, 3, 16)}, "bytes of the attributes"),
        ({"loose": ("values",)}, "must be initializers"),
    ],
)
def test_what_is_no_packed_weight_makes_no_session(changed: dict[str, Any], said: str) -> None:
    layer = layer_of("2:8", 17, 16)
    session(graph(layer))
    with pytest.raises(Exception, match=said):  # onnxruntime has a class for each of its codes
        session(graph(layer, **changed))


def test_inputs_that_do_not_fit_are_refused_at_the_call() -> None:
    layer = layer_of("1:8", 17, 64)
    made = session(graph(layer))
    for x in (torch.randn(2, 65), torch.randn(())):
        with pytest.raises(Exception, match="the last axis of x must have the features"):
            run(made, x)
    with pytest.raises(Exception, match="more axes than 16"):
        run(made, torch.randn((1,) * 16 + (64,)))
    with pytest.raises(Exception, match="bias must have the outputs"):
        run(session(graph(layer, bias=torch.zeros(16))), torch.randn(2, 64))
    assert run(made, torch.randn(2, 64)).shape == (2, 17)


def test_a_packed_network_of_8_bit_values_runs_in_onnxruntime(tmp_path: Path) -> None:
    build, inputs = MODELS["bert"]
    torch.manual_seed(0)
    packed = compress(prune(build()), measure=False, values="int8", activations="int8")
    path = export_onnx(packed, inputs, tmp_path / "packed.onnx", packed=True)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("packed_linear_int8") == 2 * 6 + 2  # the pooler and the classifier too
    got = session(path).run(None, {"input_ids": inputs["input_ids"].numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, packed(**inputs).logits.numpy(), atol=2e-3)


def test_files_with_8_bit_inputs_are_compared_without_that_rounding(tmp_path: Path) -> None:
    """Many layers make per cents of a last bit, so two right networks differ where they round."""
    torch.manual_seed(0)
    deep = prune(nn.Sequential(*[nn.Linear(32, 32) for _ in range(40)]).eval())
    for layer in deep:
        layer.weight.data *= 3
    packed = compress(deep, measure=False, values="int8", activations="int8")
    floats = compress(deep, measure=False, values="int8")
    x = torch.randn(3, 32)
    path = export_onnx(packed, x, tmp_path / "packed.onnx", packed=True)
    assert [f.name for f in tmp_path.iterdir()] == ["packed.onnx"]
    rounds = [
        a.i for n in onnx.load(path).graph.node for a in n.attribute if a.name == "activations"
    ]
    assert rounds == [1] * 40
    with torch.no_grad(), onnx_operators.inputs_not_rounded(packed, path) as twin:
        got = session(twin).run(None, {session(twin).get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), floats(x), rtol=1e-3, atol=1e-4)
        assert torch.equal(packed(x), floats(x))
    assert {layer.activations for layer in packed} == {"int8"}
    assert [f.name for f in tmp_path.iterdir()] == ["packed.onnx"]
    with onnx_operators.inputs_not_rounded(floats, path) as same:
        assert same == path


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "gpt2"))]
)
def test_packed_networks_run_in_onnxruntime(name: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    packed = compress(prune(build()), measure=False)
    path = export_onnx(packed, inputs, tmp_path / "packed.onnx", packed=True)
    graph_of = onnx.load(path).graph
    written = [node for node in graph_of.node if node.op_type == "packed_linear"]
    layers = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    assert len(written) == len(layers) >= 8
    assert all(node.domain == "nmflow" for node in written)
    made = session(path)
    key, example = next(iter(inputs.items()))
    for batch in (1, 3):  # another batch than the example's
        given = example[:1].expand(batch, *example.shape[1:]).contiguous()
        got = made.run(None, {key: given.numpy()})[0]
        packed.config.use_cache = False
        with torch.no_grad():
            want = packed(given).logits
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5)


def test_fused_rows_convolutions_and_attention_are_written_packed(tmp_path: Path) -> None:
    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 32, 3)
            self.mha = nn.MultiheadAttention(32, 4, batch_first=True)
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).transpose(1, 2)
            return self.qkv(self.mha(y, y, y, need_weights=False)[0])

    model = prune(All())
    model.qkv.weight.data[32:64] = torch.randn(32, 32)  # rows in the middle stay dense
    packed = compress(model, measure=False)
    x = torch.randn(2, 8, 6, 6)
    path = export_onnx(packed, x, tmp_path / "all.onnx", packed=True)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("packed_linear") == 1 + 4 + 2
    torch.testing.assert_close(run(session(path), x), model(x), atol=2e-5, rtol=1e-5)


def test_refusals_are_one_sentence_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = prune(nn.Sequential(nn.Linear(32, 16)))
    packed, x = compress(dense, measure=False), torch.randn(2, 32)
    with pytest.raises(CompressError, match="no packed layer"):
        export_onnx(dense, x, tmp_path / "a.onnx", packed=True)
    half = compress(dense, measure=False).bfloat16()
    with pytest.raises(CompressError, match=r"torch.bfloat16.*packed.float\(\)"):
        export_onnx(half, x.bfloat16(), tmp_path / "a.onnx", packed=True)
    with pytest.raises(CompressError, match="threads is 0"):
        onnxruntime_session_options(threads=0)
    assert not list(tmp_path.iterdir())
    own = onnxruntime.SessionOptions()
    assert nmflow.onnxruntime_session_options(threads=2, options=own) is own
    assert own.intra_op_num_threads == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CompressError, match=r"pip install 'nmflow\[onnxruntime\]'"):
        onnxruntime_session_options()
    export_onnx(packed, x, tmp_path / "b.onnx", packed=True, verify=False)


def test_a_file_serves_without_torch(tmp_path: Path) -> None:
    layer = layer_of("1:8", 16, 32)
    path = tmp_path / "p.onnx"
    path.write_bytes(graph(layer))
    program = f"""
import sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.add_session_config_entry("custom_op.packed_linear.threads", "2")
options.register_custom_ops_library({str(native.path())!r})
made = onnxruntime.InferenceSession({str(path)!r}, options)
y = made.run(None, {{"x": numpy.ones((3, 32), "float32")}})[0]
print(float(y.sum()), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    total, torch_there = done.stdout.split()
    assert float(total) == pytest.approx(float(layer(torch.ones(3, 32)).sum()), rel=1e-5)
    assert torch_there == "False"
