"""Export to ONNX and `torch.export`, masked dense or packed, checked against the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from nmflow.errors import CompressError
from nmflow.packed import onnx_files, onnx_operators
from nmflow.packed.build import PACKED
from nmflow.packed.compress import decompress
from nmflow.packed.onnx_files import agree, first_line
from nmflow.packed.packable import check_unsharded

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def export_program(
    model: nn.Module, example_inputs: Example, *, dynamic_batch: bool = True, packed: bool = False
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
    check_unsharded(model)
    return _program(plain(model, packed), example_inputs, dynamic_batch)


def export_onnx(
    model: nn.Module,
    example_inputs: Example,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    verify: bool = True,
    packed: bool = False,
) -> Path:
    """Write a network as ONNX, and check with onnxruntime that it agrees.

    ONNX has no N:M op, so the file holds the masked dense network, and runtimes multiply by its
    zeros. With `packed=True`, packed layers become nmflow's operator `nmflow::packed_linear` on
    their kept weights. onnxruntime runs it under `nmflow.onnxruntime_session_options()`; other
    runtimes refuse the file.

    Args:
        model: a dense model that holds N:M, or what `compress` returned (it is decompressed).
        example_inputs: as for `export_program`.
        path: the file; written whole or not at all.
        dynamic_batch: as for `export_program`.
        verify: run the file with onnxruntime and compare with the model.
        packed: True writes the packed layers of what `compress` returned, with float32 or 8-bit
            values.

    Returns:
        The path.

    Raises:
        CompressError: `packed`, and there is no packed layer or one that does not compute in
            float32; packages are missing (`pip install 'nmflow[onnx]'`), the export fails, the
            file cannot be written, or its outputs differ from the model's.
    """
    made, network = onnx_program(model, example_inputs, dynamic_batch, packed)

    def check(file: Path) -> None:
        args, kwargs = _arguments(example_inputs)
        with onnx_operators.inputs_not_rounded(network, file) as same:
            with _without_cache(network), torch.no_grad():
                want = _tensors(network(*args, **kwargs))
            agree(want, onnx_files.run(same, tree_leaves((args, kwargs)), packed))

    return onnx_files.write(made, Path(path), check if verify else None)


def onnx_program(
    model: nn.Module, example_inputs: Example, dynamic_batch: bool, packed: bool
) -> tuple[Any, nn.Module]:
    """The `ONNXProgram` of a network, and the network that it was made of."""
    check_unsharded(model)
    onnx_files.check_packages()
    if packed:
        onnx_operators.check_packed(model)
    network = plain(model, packed)
    made = onnx_files.translated(
        network, lambda: _program(network, example_inputs, dynamic_batch), packed
    )
    return made, network


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
            raise CompressError(f"model cannot be exported: {first_line(error)}") from error
        with torch.no_grad():
            agree(_tensors(model(*args, **kwargs)), _tensors(program.module()(*args, **kwargs)))
    return program


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


def plain(model: nn.Module, packed: bool) -> nn.Module:
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
