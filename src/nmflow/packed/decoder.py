"""Language models that decode in onnxruntime: the export of a step, and the loop around it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nmflow.errors import CompressError
from nmflow.packed import onnx_files, onnx_operators
from nmflow.packed.export import plain
from nmflow.packed.packable import check_unsharded

Past = list[tuple[Tensor, Tensor]]


def export_decoder(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    packed: bool = True,
    head: str = "float32",
    opset: int | None = None,
) -> Path:
    """Write one decoding step of a causal language model as ONNX, keys and values in and out.

    Inputs are `input_ids (batch, new)` and, of each layer, `past.I.key` and `past.I.value`
    `(batch, heads, past, size)`. Outputs are `logits (batch, 1, vocabulary)` of the last new token
    and, of each layer, `present.I.key` and `present.I.value` `(batch, heads, past + new, size)`.
    `batch`, `new` and `past` may all vary; `past` is 0 at the start. The file is run and compared
    with the model before you get it; 8-bit inputs are not rounded in that comparison, since many
    layers make per cents of a last bit that rounds otherwise.

    Args:
        model: a causal language model of transformers, in evaluation mode, whose layers all keep
            keys and values of every token (GPT-2, Llama, Qwen and the like).
        path: the file; written whole or not at all.
        packed: True writes the packed layers of what `compress` returned as nmflow's operator.
        head: `"float32"`, or `"int8"`: onnxruntime then quantizes the products that are still
            dense, the head above all, to 8-bit weights and activations.
        opset: of ONNX. None takes 23 where your torch (2.10) and onnxruntime (1.23) know it, since
            attention, rotary embeddings and norms are one operator each there, and torch's default
            elsewhere. Pass 20 for a machine whose onnxruntime is older.

    Returns:
        The path.

    Raises:
        CompressError: `head` or `opset` is unknown; the model is no such language model, or has no
            packed layer; packages are missing (`pip install 'nmflow[onnx]'`); the export fails or
            differs.
    """
    check_unsharded(model)
    if head not in ("float32", "int8"):
        raise CompressError(f"head is {head!r}: choose float32 or int8")
    if opset is not None and not 18 <= opset <= onnx_files.OPSET:
        raise CompressError(f"opset is {opset}: give one from 18 to {onnx_files.OPSET}")
    onnx_files.check_packages()
    if packed:
        onnx_operators.check_packed(model)
    step = _Step(plain(model, packed))
    example = _example(step.model, 2, 3, 5)
    layers = range(len(example[1]))
    made = onnx_files.translated(
        step,
        lambda: _program(step, example),
        packed,
        onnx_files.newest_opset() if opset is None else opset,
        input_names=["input_ids", *_names("past", layers)],
        output_names=["logits", *_names("present", layers)],
    )

    def finish(file: Path) -> None:
        _verify(step, file, packed)
        if head == "int8":
            _quantize(file)

    return onnx_files.write(made, Path(path), finish)


_NEXT = "give int64 (batch, new) with the batch of the text so far, or call reset() first"


class OnnxDecoder:
    """Runs what `export_decoder` wrote, and holds the keys and values of the text so far.

    Args:
        path: the file.
        threads: as for `onnxruntime_session_options`.

    Raises:
        CompressError: as `onnxruntime_session_options`; or the file is no such step.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        options = onnx_operators.onnxruntime_session_options(threads=threads)
        import onnxruntime

        self._values = onnxruntime.OrtValue
        cpu = ["CPUExecutionProvider"]
        what = f"path is '{os.fspath(path)}', which onnxruntime does not open"
        with onnx_operators.told(what, "give a file that nmflow.export_decoder wrote"):
            self.session: Any = onnxruntime.InferenceSession(path, options, providers=cpu)
        inputs = {i.name: i.shape for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        if "input_ids" not in inputs or "logits" not in self._outputs:
            raise CompressError(
                f"path is '{os.fspath(path)}', which takes {', '.join(inputs)}: give a file that "
                "nmflow.export_decoder wrote"
            )
        self._sizes = {name: shape for name, shape in inputs.items() if name != "input_ids"}
        self._past: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget the text so far."""
        self._past = {}

    def step(self, input_ids: Tensor) -> Tensor:
        """The logits `(batch, vocabulary)` after `input_ids (batch, new)`, added to the text.

        Raises:
            CompressError: they are not int64, or of another batch than the text so far.
        """
        make = self._values.ortvalue_from_numpy
        if not self._past:
            batch = input_ids.shape[0]
            for name, (_, heads, _, size) in self._sizes.items():
                empty = torch.zeros(batch, int(heads), 0, int(size))
                self._past[name] = make(empty.numpy())
        feed = {"input_ids": make(input_ids.contiguous().numpy()), **self._past}
        what = f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}, which does not go on"
        with onnx_operators.told(what, _NEXT):
            found = self.session.run_with_ort_values(self._outputs, feed)
        held = dict(zip(self._outputs, found, strict=True))
        logits = torch.from_numpy(held.pop("logits").numpy())
        self._past = {name.replace("present", "past", 1): v for name, v in held.items()}
        return logits[:, -1]

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
        stop: int | None = None,
    ) -> Tensor:
        """Continue a text, from its start.

        Args:
            input_ids: `(batch, new)`, texts of one length.
            max_new_tokens: tokens to add at most.
            choose: logits `(batch, vocabulary)` to the next tokens `(batch,)`; the largest by
                default. Sampling is a function of yours, such as
                `lambda z: torch.multinomial(z.softmax(-1), 1, generator=g)[:, 0]`.
            stop: a token after which no more are added, once every text has it.

        Returns:
            `(batch, new + added)`.
        """
        self.reset()
        text, new = input_ids, input_ids
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            new = choose(self.step(new))[:, None]
            text = torch.cat([text, new], 1)
            ended |= new[:, 0] == stop if stop is not None else False
            if bool(ended.all()):
                break
        return text


class _Step(nn.Module):
    """A language model as a function of new tokens and of past keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"

    def forward(self, input_ids: Tensor, past: Past) -> tuple[Tensor, Past]:
        """`(logits, present)`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (key, value) in enumerate(past):
            cache.update(key, value, i)
        new, before = input_ids.shape[1], past[0][0].shape[2]
        query, key = torch.arange(new) + before, torch.arange(new + before)
        mask = torch.where(key[None] <= query[:, None], 0.0, float("-inf"))[None, None]
        found = self.model(
            input_ids=input_ids,
            position_ids=query[None].expand(
                input_ids.shape[0], new
            ),  # of each text, for its operator
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
        )
        layers: list[Any] = list(cache.layers)
        return found.logits, [(layer.keys, layer.values) for layer in layers]


def _program(step: _Step, example: tuple[Tensor, Past]) -> ExportedProgram:
    batch, new, before = (Dim(n, min=low) for n, low in (("batch", 1), ("new", 1), ("past", 0)))
    pair = ({0: batch, 2: before}, {0: batch, 2: before})
    sizes = ({0: batch, 1: new}, [pair for _ in example[1]])
    try:
        with torch.no_grad():
            return torch.export.export(step, example, dynamic_shapes=sizes, strict=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise CompressError(
            f"model ({type(step.model).__name__}) cannot be exported as a decoding step: "
            f"{onnx_files.first_line(error)}"
        ) from error


def _example(model: nn.Module, batch: int, new: int, past: int) -> tuple[Tensor, Past]:
    """Random tokens, keys and values of the sizes that the model's config names."""
    config: Any = getattr(model, "config", None)
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    sizes: list[Any] = [getattr(config, name, None) for name in names]
    known = all(isinstance(n, int) for n in sizes) and hasattr(model, "lm_head")
    if not known or getattr(config, "is_encoder_decoder", False):
        raise CompressError(
            f"model is {type(model).__name__}: give a causal language model of transformers, such "
            "as LlamaForCausalLM"
        )
    layers, heads, width, vocabulary = sizes
    held = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or width // heads
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, new), generator=draw)
    many = [torch.randn(batch, held, past, size, generator=draw) for _ in range(2 * layers)]
    return ids, list(zip(many[::2], many[1::2], strict=True))


def _names(what: str, layers: range) -> list[str]:
    return [f"{what}.{i}.{half}" for i in layers for half in ("key", "value")]


def _verify(step: _Step, path: Path, packed: bool) -> None:
    """Compare the file with the model at sizes that the export did not see."""
    with onnx_operators.inputs_not_rounded(step, path) as file:
        for batch, new, past in ((1, 4, 0), (2, 1, 6)):
            ids, held = _example(step.model, batch, new, past)
            with torch.no_grad():
                logits, present = step(ids, held)
            given = [ids, *(half for pair in held for half in pair)]
            want = [logits, *(half for pair in present for half in pair)]
            onnx_files.agree(want, onnx_files.run(file, given, packed))


def _quantize(path: Path) -> None:
    """Let onnxruntime quantize the dense products of a file, in place.

    The table of words is looked up, not multiplied, so it stays as it is; a head that shares it
    gets a matrix of its own, since onnxruntime quantizes constants only.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if len(list(path.parent.iterdir())) > 1:
        raise CompressError("head is 'int8' and the file is above 2 GB: pass head='float32'")
    model = onnx.load(path)
    graph = model.graph
    held = {t.name: t for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in held]:
        order = next((a.ints for a in node.attribute if a.name == "perm"), None)
        turned = onnx.numpy_helper.to_array(held[node.input[0]]).transpose(order)
        graph.initializer.append(onnx.numpy_helper.from_array(turned, node.output[0]))
        graph.node.remove(node)
    # Types are not inferred across operators that onnx does not know.
    unknown = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(
        model, path, ["MatMul", "Gemm"], weight_type=QuantType.QInt8, extra_options=unknown
    )
