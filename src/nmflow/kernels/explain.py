"""`explain`: run a module once and say which kernel served each packed product, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmflow.errors import CompressError
from nmflow.kernels.backend import Call
from nmflow.kernels.layout import Shape
from nmflow.kernels.registry import Choice, choose
from nmflow.select.modules import check_model


class Explanation(list[tuple[str, Choice]]):
    """(path of the module, choice) of every packed product of a run, in order; `str` is a list.

    Attributes:
        together: paths of the layers of each group that is computed in one call.
    """

    together: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        said = "\n".join(f"{path or 'model'}: {choice}" for path, choice in self)
        for group in self.together:
            said += f"\ncomputed in one call: {', '.join(group)}"
        return said


class _Listen(TorchDispatchMode):
    """Notes every packed product that passes, with the module that is running."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found = Explanation()
        self.running: list[str] = [""]
        # A layer's product may be computed while another runs: its weight says whose it is.
        self.paths = {
            id(held): path
            for path, part in module.named_modules()
            for held in part.buffers(recurse=False)
        }
        names = {part: path for path, part in module.named_modules()}
        blocks = [getattr(part, "computed_with", None) for part in names]
        self.found.together = tuple(
            tuple(names.get(layer, "") for layer in block.layers)
            for block in dict.fromkeys(blocks)
            if block is not None
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.nmflow.matmul.default:
            x, values, _, _, *dims, epilogue = args
            self._note(x, values, dims, values.dtype, epilogue, "")
        elif func is torch.ops.nmflow.matmul_int8.default:
            x, stream, _, *dims, activations, epilogue = args
            values = "int8, activations too" if activations else "int8"
            self._note(x, stream, dims, x.dtype, epilogue, values)
        return func(*args, **(kwargs or {}))

    def _note(
        self, x: torch.Tensor, weight: torch.Tensor, dims: list[int], dtype: torch.dtype,
        epilogue: int, values: str,
    ) -> None:  # fmt: skip
        shape, threads = Shape(*dims), torch.get_num_threads()
        tokens = x.numel() // shape.inputs
        call = Call(shape, dtype, x.device.type, tokens, threads, epilogue, values)
        self.found.append((self.paths.get(id(weight), self.running[-1]), choose(call)))


def explain(module: nn.Module, example_inputs: Any) -> Explanation:
    """Say which kernel serves each packed product of a module for some inputs, and why.

    The module runs once, without gradients, on the inputs.

    Args:
        module: a packed layer, or a whole model.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        A list of `(path, Choice)`. Each `Choice` names the backend and the kernel, and the reason
        why each backend before it in the registry did not serve the call.

    Raises:
        CompressError: the module made no packed product.

    Example:
        >>> import nmflow
        >>> layer = nn.Linear(64, 32)
        >>> layer.weight.data *= nmflow.mask(layer.weight, "1:16")
        >>> packed = nmflow.compress(nn.Sequential(layer), measure=False)
        >>> path, choice = explain(packed, torch.ones(1, 64))[0]
        >>> path, choice.call.tokens
        ('0', 1)
    """
    check_model(module, CompressError, "module")
    listen = _Listen(module)
    handles = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(_enter(listen.running, path)))
        handles.append(part.register_forward_hook(_leave(listen.running), always_call=True))
    try:
        with torch.no_grad(), listen:
            if isinstance(example_inputs, Mapping):
                module(**example_inputs)
            else:
                inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
                module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not listen.found:
        raise CompressError(
            "module made no packed product for this example: give what nmflow.compress returned, "
            "whose nmflow.report_of says which layers it kept dense, and why"
        )
    return listen.found


def _enter(running: list[str], path: str) -> Any:
    return lambda module, args: running.append(path)


def _leave(running: list[str]) -> Any:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    return leave
