"""Export to ONNX and `torch.export`, masked dense or packed, checked against the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from nmflow import disk
from nmflow.errors import CompressError
from nmflow.packed import onnx_operators
from nmflow.packed.build import PACKED
from nmflow.packed.compress import decompress
from nmflow.packed.modules import PackedLinear

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def export_program(
    model: nn.Module, example_inputs: Example, dynamic_batch: bool = True, packed: bool = False
) -> ExportedProgram:
    """Export with `torch.export`: the masked dense network, or the packed one with nmflow's ops.

    Args:
        model: a dense model that holds N:M, or what `compress` returned.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        dynamic_batch: True lets the first axis of every input tensor vary, all together; the
            example then needs at least 2 along it.
        packed: True keeps packed modules; running the program then needs `import nmflow.kernels`.

    Raises:
        CompressError: the model's outputs and the program's differ, or torch cannot export it.
    """
    return _program(_plain(model, packed), example_inputs, dynamic_batch)


def export_onnx(
    model: nn.Module,
    example_inputs: Example,
    path: str | os.PathLike[str],
    dynamic_batch: bool = True,
    verify: bool = True,
    packed: bool = False,
) -> Path:
    """Write a network as ONNX, and check with onnxruntime that it agrees.

    ONNX knows no N:M op, so the masked dense network has its weights with their zeros, and every
    runtime multiplies by them. With `packed=True` the packed layers are nmflow's own operator,
    `nmflow::packed_linear`, on their kept weights: onnxruntime runs it under
    `nmflow.onnxruntime_session_options()`, and other runtimes refuse the file.

    Args:
        model: a dense model that holds N:M, or what `compress` returned (it is decompressed).
        example_inputs: as for `export_program`.
        path: the file; written whole or not at all.
        dynamic_batch: as for `export_program`.
        verify: run the file with onnxruntime and compare with the model.
        packed: True writes the packed layers of what `compress` returned, in float32.

    Returns:
        The path.

    Raises:
        CompressError: `packed` and there is no packed layer, or one that is not float32; packages
            are missing (`pip install 'nmflow[onnx]'`), the export fails, the
            file cannot be written, or its outputs differ from the model's.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise CompressError(
            f"export to ONNX needs the package {error.name!r}: pip install 'nmflow[onnx]'"
        ) from error
    target = Path(path)
    if packed:
        _check_packed(model)
    network = _plain(model, packed)
    table = onnx_operators.translation() if packed else None

    def exported() -> Any:
        program = _program(network, example_inputs, dynamic_batch)
        return torch.onnx.export(
            program, dynamo=True, verbose=False, custom_translation_table=table
        )

    try:
        made = exported()
    except torch.onnx.OnnxExporterError as error:
        # ONNX takes attention apart, and torch's fused op lays its output out otherwise than its
        # parts do, so transformers' attention is asked for its parts.
        try:
            with _attention_in_parts(network) as changed:
                if not changed:
                    raise
                made = exported()
        except torch.onnx.OnnxExporterError:
            why = _first_line(error.__cause__ or error)
            raise CompressError(f"model cannot be written as ONNX: {why}") from error
    assert made is not None
    try:
        # Weights above 2 GB go to a file of their own beside it, so a folder is moved, not a file.
        with disk.staging(target.parent) as folder:
            part = folder / target.name
            made.save(str(part))
            if verify:
                args, kwargs = _arguments(example_inputs)
                with _without_cache(network), torch.no_grad():
                    want = _tensors(network(*args, **kwargs))
                _agree(want, _run_onnx(part, tree_leaves((args, kwargs)), packed))
            for file in sorted(folder.iterdir(), key=lambda f: f == part):
                os.replace(file, target.with_name(file.name))
    except OSError as error:
        raise CompressError(f"path '{target}' cannot be written: {error}") from error
    return target


def _program(model: nn.Module, example: Example, dynamic_batch: bool) -> ExportedProgram:
    """Export and compare."""
    args, kwargs = _arguments(example)
    shapes = tree_map(_first_axis, kwargs or args) if dynamic_batch else None
    with _without_cache(model):
        try:
            # Not strict, as newer torch has for its default: the strict tracer of torch 2.6 loses
            # the size of a dynamic batch where a function of autograd takes it.
            with torch.no_grad():
                program = torch.export.export(
                    model, args, kwargs, dynamic_shapes=shapes, strict=False
                )
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise CompressError(f"model cannot be exported: {_first_line(error)}") from error
        with torch.no_grad():
            _agree(_tensors(model(*args, **kwargs)), _tensors(program.module()(*args, **kwargs)))
    return program


def _check_packed(model: nn.Module) -> None:
    """Raise unless the network has packed layers, all of which onnxruntime's CPU kernels run."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise CompressError(
            "packed is True and model holds no packed layer: give what nmflow.compress returned, "
            "or leave packed=False"
        )
    for path, layer in layers.items():
        if layer.values.dtype != torch.float32:
            raise CompressError(
                f"packed is True and {path or 'the model'} is {layer.values.dtype}: onnxruntime "
                "runs packed layers in float32, so export packed.float()"
            )


def _run_onnx(path: Path, inputs: Sequence[Any], packed: bool) -> list[Tensor]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise CompressError(
            "verify needs the package 'onnxruntime': pip install 'nmflow[onnx]', or verify=False"
        ) from error
    options = onnx_operators.onnxruntime_session_options() if packed else None
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Networks of transformers that keep no keys and values: a cache is an object, no tensor."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    kept = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    try:
        for config in kept:
            config.use_cache = False
        yield
    finally:
        for config in kept:
            config.use_cache = True


@contextlib.contextmanager
def _attention_in_parts(model: nn.Module) -> Iterator[bool]:
    """Networks of transformers that compute attention by plain products; whether there are any."""
    was = {
        m: implementation
        for m in model.modules()
        if hasattr(type(m), "set_attn_implementation")
        and (implementation := getattr(m.config, "_attn_implementation", "eager")) != "eager"
    }
    try:
        for module in was:
            module.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        yield bool(was)
    finally:
        for module, implementation in was.items():
            module.set_attn_implementation(implementation)  # pyright: ignore[reportCallIssue]


def _plain(model: nn.Module, packed: bool) -> nn.Module:
    """The model itself, or decompressed; in evaluation mode as the caller set it."""
    if packed or not any(isinstance(m, PACKED) for m in model.modules()):
        return model
    return decompress(model)


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _first_axis(value: Any) -> Any:
    # A bound, since torch 2.6 takes the lack of one for a size that the network might forbid.
    batch = {0: Dim("batch", min=1, max=2**31 - 1)}
    return batch if isinstance(value, Tensor) and value.dim() else None


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def _agree(want: list[Tensor], got: list[Tensor]) -> None:
    if len(want) != len(got):
        raise CompressError(f"the export has {len(got)} outputs and the model {len(want)}")
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        a, b = a.double(), b.double()
        scale = max(float(a.abs().max()), 1e-6) if a.numel() else 1.0
        if a.shape != b.shape or (a.numel() and float((a - b).abs().max()) > 1e-3 * scale):
            raise CompressError(
                f"output {i} of the export differs from the model's by more than 0.1 % of its "
                "largest value: export in evaluation mode (model.eval())"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
