"""ONNX files: written by torch's exporter, whole or not at all, and run to see that they agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nmflow import disk
from nmflow.errors import CompressError
from nmflow.packed import onnx_operators
from nmflow.packed.outputs import check_near

# What transformers calls the implementations whose every step is an operator of ONNX.
_PLAIN = {"attn": "eager", "experts": "batched_mm"}

OPSET = 23  # the first that has attention, rotary embeddings and RMSNorm


def check_packages() -> None:
    """Raise unless the packages that write ONNX are there."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise CompressError(
            f"export to ONNX needs the package {error.name!r}: pip install 'nmflow[onnx]'"
        ) from error


def translated(
    network: nn.Module,
    program: Callable[[], ExportedProgram],
    packed: bool,
    opset: int | None = None,
    **names: Any,
) -> Any:
    """The `ONNXProgram` of an exported network; `names` are torch's names of inputs and outputs.

    `opset` is None for what torch writes by default.
    """
    table = onnx_operators.translation() if packed else None

    def exported() -> Any:
        return torch.onnx.export(
            program(),
            dynamo=True,
            verbose=False,
            custom_translation_table=table,
            opset_version=opset,
            **names,
        )

    try:
        return exported()
    except torch.onnx.OnnxExporterError as error:
        # ONNX takes attention apart, and torch's fused op lays its output out otherwise than its
        # parts do, so transformers' attention is asked for its parts. It has no grouped product of
        # experts, so each token gathers the weights of its own.
        try:
            with _in_parts(network) as changed:
                if not changed:
                    raise
                return exported()
        except torch.onnx.OnnxExporterError:
            why = first_line(error.__cause__ or error)
            raise CompressError(f"model cannot be written as ONNX: {why}") from error


def newest_opset() -> int | None:
    """23 where torch writes it and onnxruntime runs it: there attention and norms are operators.

    None elsewhere, which is torch's default.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:  # `run` says so
        return None
    known = onnxruntime.__version__, torch.__version__
    ours = [tuple(int(n) for n in text.split("+")[0].split(".")[:2]) for text in known]
    return OPSET if ours[0] >= (1, 23) and ours[1] >= (2, 10) else None


def write(made: Any, target: Path, finish: Callable[[Path], None] | None) -> Path:
    """Save beside the target, let `finish` check or change the file, then move it there."""
    try:
        # Weights above 2 GB go to a file of their own beside it, so a folder is moved, not a file.
        with disk.staging(target.parent) as folder:
            part = folder / target.name
            made.save(str(part))
            if finish is not None:
                finish(part)
            for file in sorted(folder.iterdir(), key=lambda f: f == part):
                os.replace(file, target.with_name(file.name))
    except OSError as error:
        raise CompressError(f"path '{target}' cannot be written: {error}") from error
    return target


def run(path: Path, inputs: Sequence[Any], packed: bool) -> list[Tensor]:
    """The outputs that onnxruntime gives for some inputs."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise CompressError(
            "verify needs the package 'onnxruntime': pip install 'nmflow[onnx]', or verify=False"
        ) from error
    options = onnx_operators.onnxruntime_session_options() if packed else None
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    mend = "use another version of it or of torch, or pass verify=False where there is that"
    with onnx_operators.told("onnxruntime does not run the export", mend):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]


def agree(want: list[Tensor], got: list[Tensor]) -> None:
    """Raise unless an export's outputs are the model's, to 0.1 % of their largest value."""
    mend = "export in evaluation mode (model.eval())"
    check_near(want, got, 1e-3, "the export", "the model", mend)


def first_line(error: BaseException) -> str:
    """The first line of an error, short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _in_parts(model: nn.Module) -> Iterator[bool]:
    """Networks of transformers that compute by plain products; whether there are any."""
    was = [
        (getattr(module, f"set_{what}_implementation"), implementation, plain)
        for module in model.modules()
        for what, plain in _PLAIN.items()
        if hasattr(type(module), f"set_{what}_implementation")
        and (implementation := getattr(module.config, f"_{what}_implementation", plain)) != plain
    ]
    try:
        for change, _, plain in was:
            change(plain)
        yield bool(was)
    finally:
        for change, implementation, _ in was:
            change(implementation)
