"""Packed layers in onnxruntime: two operators, how they are written and what runs them.

The operators are in the compiled library (`csrc/onnxruntime`), which exports what onnxruntime
looks up in a library of operators. `nmflow::packed_linear` takes x `(..., in)`, values and codes in
kernel layout, and optionally a bias `(out,)`; `nmflow::packed_linear_int8` the stream of 8-bit
values in their place. Attributes are `ATTRIBUTES`, and for 8-bit values `activations`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmflow import native
from nmflow.errors import CompressError
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.modules import PackedLinear
from nmflow.text_table import one_line

DOMAIN, NAME, NAME_INT8, VERSION = "nmflow", "packed_linear", "packed_linear_int8", 1
ATTRIBUTES = ("out_features", "in_features", "n", "m", "panel", "epilogue")
# The session's entry that says for how many threads a product is cut.
THREADS = f"custom_op.{NAME}.threads"


def onnxruntime_session_options(*, threads: int | None = None, options: Any = None) -> Any:
    """Session options under which onnxruntime runs packed networks, on its own threads.

    Args:
        threads: onnxruntime's threads inside an operator; `torch.get_num_threads()` by default.
        options: `onnxruntime.SessionOptions` to extend; new ones by default.

    Returns:
        `onnxruntime.SessionOptions` with nmflow's operators, for
        `onnxruntime.InferenceSession(path, options)`.

    Raises:
        CompressError: `threads` is not positive, onnxruntime is missing or older than 1.17, or
            the compiled library is missing.

    Example:
        >>> import pytest
        >>> runtime = pytest.importorskip("onnxruntime")
        >>> options = onnxruntime_session_options(threads=2)
        >>> options.intra_op_num_threads
        2
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise CompressError(f"threads is {threads}: give a positive number of threads")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise CompressError(
            "packed networks in onnxruntime need the package 'onnxruntime': "
            "pip install 'nmflow[onnxruntime]'"
        ) from error
    if not native.available():
        raise CompressError(
            f"packed networks in onnxruntime need the compiled library: {native.why_not()}"
        )
    options = onnxruntime.SessionOptions() if options is None else options
    options.intra_op_num_threads = threads
    options.add_session_config_entry(THREADS, str(threads))
    with told("onnxruntime refuses nmflow's operators", "use another version of it"):
        options.register_custom_ops_library(str(native.path()))
    return options


@contextlib.contextmanager
def told(what: str, mend: str) -> Iterator[None]:
    """Errors of onnxruntime as `CompressError`: what happened, what it says, what to do."""
    try:
        yield
    except Exception as error:
        # Its own derive from nothing else, and come from several modules of its package.
        own = type(error).__module__.partition(".")[0] == "onnxruntime"
        if not own and type(error) is not RuntimeError:
            raise
        raise CompressError(f"{what} ({one_line(error)}): {mend}") from error


def check_packed(model: nn.Module) -> None:
    """Raise unless the network has packed layers, all of which onnxruntime's CPU kernels run."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise CompressError(
            "packed is True and model holds no packed layer: give what nmflow.compress returned, "
            "or leave packed=False"
        )
    for path, layer in layers.items():
        if layer.computes != torch.float32:
            mend = (
                "export packed.float()"
                if layer.computes == layer.like.dtype
                else "compress without dtype"
            )
            raise CompressError(
                f"packed is True and {path or 'the model'} multiplies in {layer.computes}: "
                f"onnxruntime runs packed layers in float32, so {mend}"
            )


@contextlib.contextmanager
def inputs_not_rounded(model: nn.Module, path: Path) -> Iterator[Path]:
    """The file and the network as they would be with 8-bit values, but without 8-bit inputs.

    A difference in the last bit of an input may round it to the next whole number, and after many
    layers the outputs of two right networks differ by per cents. Without that rounding they agree,
    so everything else of a file can be compared closely.
    """
    layers = [m for m in model.modules() if isinstance(m, Int8Linear) and m.activations != "float"]
    if not layers:
        yield path
        return
    import onnx

    twin = path.with_name(f"{path.stem}-float.onnx")
    made = onnx.load(path, load_external_data=False)
    for node in made.graph.node:
        for attribute in node.attribute if node.op_type == NAME_INT8 else ():
            if attribute.name == "activations":
                attribute.i = 0
    was = [layer.activations for layer in layers]
    try:
        onnx.save(made, twin)
        for layer in layers:
            layer.activations = "float"
        yield twin
    finally:
        for layer, activations in zip(layers, was, strict=True):
            layer.activations = activations
        twin.unlink(missing_ok=True)


def translation() -> dict[Any, Callable[..., Any]]:
    """The table by which torch's exporter writes nmflow's products as its operators."""
    numbers = (*ATTRIBUTES[:-1], "activations", ATTRIBUTES[-1])
    return {
        torch.ops.nmflow.matmul.default: _writer(NAME, ("values", "codes"), ATTRIBUTES),
        torch.ops.nmflow.matmul_int8.default: _writer(NAME_INT8, ("stream",), numbers),
    }


def _writer(name: str, weight: tuple[str, ...], numbers: tuple[str, ...]) -> Callable[..., Any]:
    """What writes one operator, from the arguments of the op that it stands for."""
    import onnx
    from onnxscript import values

    schema, kind = onnx.defs.OpSchema, onnx.defs.OpSchema.AttrType.INT
    given, optional = schema.FormalParameter, schema.FormalParameterOption.Optional
    buffers = ["tensor(float)", "tensor(int32)", "tensor(uint8)"]
    described = schema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            given("x", "T"),
            *(given(own, f"T_{own}") for own in weight),
            given("bias", "T", param_option=optional),
        ],
        outputs=[given("y", "T")],
        type_constraints=[
            ("T", ["tensor(float)"], ""),
            *((f"T_{own}", buffers, "") for own in weight),
        ],
        attributes=[schema.Attribute(number, kind) for number in numbers],
    )
    write = values.Op(values.Opset(DOMAIN, VERSION), name, described)
    inputs = len(weight) + 2

    def operator(*args: Any) -> Any:
        return write(*args[:inputs], **dict(zip(numbers, args[inputs:], strict=True)))

    return operator
