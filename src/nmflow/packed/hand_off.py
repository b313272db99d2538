"""Hand a pruned network to other runtimes: int8 ONNX with its zeros, and torch's 2:4 on CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmflow import disk
from nmflow.errors import CompressError
from nmflow.masks import holds
from nmflow.packed.build import PACKED
from nmflow.packed.export import Example, onnx_program
from nmflow.packed.onnx_operators import told
from nmflow.packed.outputs import check_near
from nmflow.packed.packable import check_unsharded

# How far an output of the int8 network may be off, as a share of its largest value.
_NEAR = 0.1
_NOT_RUN = "onnxruntime does not quantize the network, or run what it made"
_MEND = "give inputs like those that will be served as calibration, or verify=False"
# What the sparse tensor cores of torch take: dtypes, and what sizes are multiples of.
_DTYPES = (torch.float16, torch.bfloat16)
_STEP = 64


def export_onnx_int8(
    model: nn.Module,
    example_inputs: Example,
    path: str | os.PathLike[str],
    *,
    calibration: Iterable[Example] | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
) -> Path:
    """Write the masked network as ONNX in int8, with Q/DQ nodes, its zeros exact.

    Weights of linear layers and convolutions are int8 with one scale for each output, and no
    offset: `q = round(w / s)`, so a pruned weight is 0 and the pattern stays. Their inputs get
    8-bit `QuantizeLinear` and `DequantizeLinear` nodes, whose ranges come from `calibration`.
    Everything else stays float32. onnxruntime's own quantizer does the work.

    Args:
        model: a dense model that holds N:M, or what `compress` returned (it is decompressed).
        example_inputs: as for `export_onnx`.
        path: the file; written whole or not at all.
        calibration: inputs of the same form, some hundreds that are like those that it will serve;
            None takes `example_inputs` alone, which suits a trial.
        dynamic_batch: as for `export_onnx`.
        verify: run the file with onnxruntime on `example_inputs`; no output may differ from the
            float32 one's by more than 10 % of its largest value.

    Returns:
        The path.

    Raises:
        CompressError: as `export_onnx`; calibration is empty or of another form; the int8 outputs
            differ too much.
    """
    check_unsharded(model)
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    except ModuleNotFoundError as error:
        raise CompressError(
            f"export to int8 needs the package {error.name!r}: pip install 'nmflow[onnx]'"
        ) from error
    target = Path(path)
    given = [example_inputs] if calibration is None else list(calibration)
    if not given:
        raise CompressError("calibration is empty: give inputs like those that will be served")
    made, _ = onnx_program(model, example_inputs, dynamic_batch, packed=False)
    try:
        with told(_NOT_RUN, _MEND), disk.staging(target.parent) as folder:
            dense = folder / "dense.onnx"
            made.save(str(dense))
            names = _inputs(dense)
            part = folder / target.name
            quantize_static(
                dense,
                part,
                _Reader([_feed(names, one) for one in given]),  # pyright: ignore[reportArgumentType]
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8,
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
            )
            if verify:
                feed = _feed(names, example_inputs)
                pair = _run(dense, feed), _run(part, feed)
                check_near(*pair, _NEAR, "the int8 network", "the float32 one", _MEND)
            os.replace(part, target)
    except OSError as error:
        raise CompressError(f"path '{target}' cannot be written: {error}") from error
    return target


def to_semi_structured(model: nn.Module) -> list[str]:
    """Run the 2:4 linear layers of a network on the sparse tensor cores of a GPU, in place.

    Each `nn.Linear` whose weight holds 2:4 gets `torch.sparse.to_sparse_semi_structured(weight)`
    for a weight, for inference.

    Args:
        model: a dense network on a CUDA device of compute capability 8.0 or more, in float16 or
            bfloat16.

    Returns:
        The paths of the layers that were changed.

    Raises:
        CompressError: no weight can be changed, with the reason of the first; or the network is
            packed. Nothing is changed.
    """
    check_unsharded(model)
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise CompressError("model is packed: call nmflow.decompress(model), and move it to CUDA")
    linear = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear]
    whys = {path: _why_not(module.weight) for path, module in linear}
    done = [(path, module) for path, module in linear if not whys[path]]
    if not done:
        first = next(iter(whys.items()), None)
        said = "it has no nn.Linear" if first is None else f"{first[0] or 'it'}: {first[1]}"
        raise CompressError(f"model has no weight for sparse tensor cores ({said})")
    for _, module in done:
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(sparse, requires_grad=False)
    return [path for path, _ in done]


def _why_not(weight: Tensor) -> str:
    """Why a weight cannot run on sparse tensor cores; empty if it can."""
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}: call model.half() or model.bfloat16()"
    if any(size % _STEP for size in weight.shape):
        return f"its shape {tuple(weight.shape)} is not a multiple of {_STEP}"
    if not holds(weight.detach(), "2:4"):
        return "its weight does not hold 2:4"
    if weight.device.type != "cuda":
        return f"its weight is on {weight.device}: move the model to CUDA"
    return ""


class _Reader:
    """What onnxruntime asks for inputs to calibrate with."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next input; None after the last."""
        return next(self._left, None)


def _inputs(path: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def _feed(names: list[str], example: Example) -> dict[str, Any]:
    """The inputs of the graph, from an example."""
    given = dict(example) if isinstance(example, Mapping) else example
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    if len(tensors) != len(names):
        raise CompressError(
            f"calibration has an input of {len(tensors)} tensors and the network takes "
            f"{len(names)}: give inputs of the form of example_inputs"
        )
    return dict(zip(names, (t.detach().cpu().numpy() for t in tensors), strict=True))


def _run(path: Path, feed: Mapping[str, Any]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, dict(feed))]
