"""What people deploy instead of a packed network, to run beside it: other dtypes and runtimes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.bench import ways
from nmflow.errors import CompressError
from nmflow.packed.export import export_onnx
from nmflow.packed.modules import PackedLinear
from nmflow.packed.onnx_files import first_line
from nmflow.packed.onnx_operators import onnxruntime_session_options

Runs = dict[str, Callable[[], object]]
Packed = Mapping[str, nn.Module]  # by the name of their way, such as "packed int8"
INT8 = "int8 dynamic (torch)"
BF16 = "bfloat16 (torch)"


def race(
    names: Sequence[str], model: nn.Module, packed: Packed, example: Mapping[str, Any],
    folder: Path, progress: Callable[[str], None] = lambda what: None,
) -> tuple[Runs, dict[str, str]]:  # fmt: skip
    """A function for every way of the named rivals, and why the others are left out.

    Args:
        names: of `RIVALS`.
        model: the dense network, float32.
        packed: the same network, packed in one or several ways, by their names.
        example: keyword arguments of its forward pass.
        folder: where exported files may lie for as long as the functions run.
        progress: called with a few words before each rival is built.

    Raises:
        CompressError: an unknown name.
    """
    check_names(names)
    runs: Runs = {}
    skipped: dict[str, str] = {}
    for name in names:
        progress(f"the network: building its rival {name}")
        try:
            runs |= RIVALS[name](model, packed, example, folder)
        except CompressError as error:
            skipped[name] = str(error)
    return runs, skipped


def check_names(names: Sequence[str]) -> None:
    """Raise `CompressError` for an unknown rival."""
    for name in names:
        if name not in RIVALS:
            raise CompressError(f"rivals has {name!r}: choose from {', '.join(RIVALS)}")


def _int8(model: nn.Module, packed: Packed, example: Mapping[str, Any], folder: Path) -> Runs:
    eight = ways.int8_dynamic(model)
    if eight is None:
        raise CompressError("this torch has no engine for int8 dynamic quantization")
    return {INT8: lambda: eight(**example)}


def _bfloat16(model: nn.Module, packed: Packed, example: Mapping[str, Any], folder: Path) -> Runs:
    """The best dense way in bfloat16: on AMX the one to beat."""
    floats = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in example.items()
    }
    half = copy.deepcopy(model).bfloat16()
    with torch.inference_mode(False):
        half = ways.best_dense(half, floats)
    return {BF16: lambda: half(**floats)}


def _compile(model: nn.Module, packed: Packed, example: Mapping[str, Any], folder: Path) -> Runs:
    """torch's own compiler, on the dense network and on the packed ones."""
    runs: Runs = {}
    networks = {"torch.compile": model} | {f"torch.compile, {n}": m for n, m in packed.items()}
    for name, network in networks.items():
        made = torch.compile(network, dynamic=False)
        try:
            with torch.inference_mode():
                made(**example)  # which compiles
        except RuntimeError as error:  # dynamo's and inductor's own errors derive from it
            raise CompressError(f"torch.compile fails: {first_line(error)}") from error
        runs[name] = lambda made=made: made(**example)
    return runs


def _onnxruntime(
    model: nn.Module, packed: Packed, example: Mapping[str, Any], folder: Path
) -> Runs:
    """onnxruntime in float32, with its own int8 dynamic quantization, and with packed layers."""
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ModuleNotFoundError as error:
        raise CompressError(
            f"onnxruntime's figures need the package {error.name!r}: pip install 'nmflow[onnx]'"
        ) from error
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        plain = export_onnx(model, example, folder / "dense.onnx", dynamic_batch=False)
        small = folder / "int8.onnx"
        quantize_dynamic(plain, small, weight_type=QuantType.QInt8)
        files = {"onnxruntime float32": plain, "onnxruntime int8 dynamic": small}
        for number, (name, network) in enumerate(packed.items()):
            if any(isinstance(m, PackedLinear) for m in network.modules()):
                file = folder / f"packed-{number}.onnx"
                files[f"onnxruntime {name}"] = export_onnx(
                    network, example, file, dynamic_batch=False, packed=True
                )
    runs: Runs = {}
    given = [t.numpy() for t in example.values() if isinstance(t, Tensor)]
    for name, path in files.items():
        session = onnxruntime.InferenceSession(
            path, onnxruntime_session_options(), providers=["CPUExecutionProvider"]
        )
        feed = {i.name: t for i, t in zip(session.get_inputs(), given, strict=True)}
        runs[name] = lambda session=session, feed=feed: session.run(None, feed)
    return runs


RIVALS: dict[str, Callable[[nn.Module, Packed, Mapping[str, Any], Path], Runs]] = {
    "int8": _int8,
    "bfloat16": _bfloat16,
    "compile": _compile,
    "onnxruntime": _onnxruntime,
}
"""The rivals of a float32 network by name."""
