"""What of two networks' outputs a distiller compares, and at which positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nmflow.errors import DistillError

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
"""What logits can be, in the words of transformers' `config.problem_type`."""

# Logits over classes on the last axis, under the names of transformers. Others are of another kind,
# such as a router's or a mask's pixels.
_PREDICTIONS = (
    "logits",
    "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits",
    "logits_per_image", "logits_per_text",
)  # fmt: skip
# By the name of the states, what says which positions of them count; the first that fits.
_STATES = {
    "hidden_states": ("attention_mask",),
    "encoder_hidden_states": ("attention_mask",),
    "decoder_hidden_states": ("labels", "decoder_attention_mask"),
}
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")


def check_outputs(outputs: Any, who: str) -> None:
    """Raise unless outputs have names.

    Raises:
        DistillError: they have none.
    """
    if not isinstance(outputs, Mapping):
        raise DistillError(
            f"the {who}'s outputs are a {type(outputs).__name__}: return a mapping with `logits`, "
            "as networks of transformers do with config.return_dict=True"
        )


def predictions(outputs: Mapping[str, Any], who: str) -> dict[str, Tensor]:
    """The logits by name: `logits`, or those of the heads of a network that has several.

    Raises:
        DistillError: there are none.
    """
    found = {n: outputs[n] for n in _PREDICTIONS if isinstance(outputs.get(n), Tensor)}
    if not found:
        raise DistillError(
            f"the {who}'s outputs are {', '.join(outputs)}, without logits over classes: set "
            "logits=0, or turn off what leaves them out, such as use_liger_kernel"
        )
    return {"logits": found["logits"]} if "logits" in found else found


def hidden_states(outputs: Mapping[str, Any], who: str) -> dict[str, list[Tensor]]:
    """The hidden states by name: of an encoder and a decoder, each of its own.

    Raises:
        DistillError: there are none.
    """
    found = {name: list(outputs[name]) for name in _STATES if outputs.get(name) is not None}
    if not found:
        raise DistillError(
            f"the {who}'s outputs have no hidden states: pass output_hidden_states=True, or set "
            "hidden=0"
        )
    return found


def counting(labels: Any) -> Tensor | None:
    """Which labels count; None where they are no classes."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    return labels != IGNORED


def problem_of(logits: Tensor, labels: Any, config: Any) -> str:
    """What logits are, as transformers decides it: by the config, their number and the labels.

    Raises:
        DistillError: one logit of a network without a config.
    """
    told = getattr(config, "problem_type", None)
    if logits.ndim == 2 and told in PROBLEMS:
        return str(told)
    if logits.shape[-1] == 1:
        if logits.ndim == 2 and getattr(config, "num_labels", None) == 1:
            return "regression"
        raise DistillError(
            f"the logits are {tuple(logits.shape)}, and nothing tells what a single one is: give "
            "problem='regression', or problem='multi_label_classification' for a yes or no"
        )
    values = isinstance(labels, Tensor) and labels.is_floating_point()
    return PROBLEMS[1] if values and labels.shape == logits.shape else PROBLEMS[0]


def classes_last(logits: Tensor, labels: Any, config: Any) -> Tensor:
    """Logits with the axis of the classes at the end: that of a segmentation is axis 1.

    Raises:
        DistillError: four axes or more, and neither labels nor the config tell which it is.
    """
    shape, vocabulary = logits.shape, getattr(config, "vocab_size", None)
    labelled = labels.shape if isinstance(labels, Tensor) else None
    if logits.ndim < 3 or shape[-1] == vocabulary or labelled == shape[:-1]:
        return logits
    pixels = logits.ndim > 3 and shape[1] == getattr(config, "num_labels", None)
    if labelled == shape[:1] + shape[2:] or pixels:
        return logits.movedim(1, -1)
    if logits.ndim > 3:
        raise DistillError(
            f"the logits are {tuple(shape)}, and neither labels nor config.num_labels tell which "
            "axis has the classes: set logits=0 and add nmflow.distill.logit_loss"
        )
    return logits


def positions_of(
    shape: tuple[int, ...], batch: Mapping[str, Any], shifted: bool, teacher: nn.Module
) -> tuple[Tensor | None, bool]:
    """Which positions of logits count (None for all), and whether the last has no label.

    Args:
        shape: of the logits, without their classes.
        batch: the keyword arguments.
        shifted: whether a label belongs to the logits one position before it.
        teacher: tells which frames of sound count.
    """
    for name in ("shift_labels", "labels"):
        labels = counting(batch.get(name))
        if labels is not None and labels.shape == shape:
            cut = shifted and name == "labels"
            return (labels[..., 1:] if cut else labels), cut
    return fitted(batch.get("attention_mask"), shape, teacher), False


def state_mask(
    name: str, shape: tuple[int, ...], batch: Mapping[str, Any], teacher: nn.Module
) -> Tensor | None:
    """Which positions of hidden states `(rows, positions, ...)` count; None for all."""
    sources = _STATES[name]
    if name == "decoder_hidden_states" and not any(batch.get(n) is not None for n in _DECODED):
        sources = (*sources, "attention_mask")  # without inputs of its own it reads the encoder's
    for source in sources:
        mask = batch.get(source)
        mask = fitted(counting(mask) if source == "labels" else mask, shape[:2], teacher)
        if mask is not None:
            return mask
    return None


def fitted(mask: Any, shape: tuple[int, ...], teacher: nn.Module) -> Tensor | None:
    """A mask in the shape of positions, if it is of them.

    The choices of one example are rows of their own inside a network. Samples of sound become
    frames, and the network knows how many.
    """
    if not isinstance(mask, Tensor) or mask.ndim < 2 or len(shape) < 2:
        return None
    if mask.shape == shape:
        return mask
    length, frames = mask.shape[-1], getattr(teacher, "_get_feature_vector_attention_mask", None)
    if len(shape) == 2 and (mask.numel() // max(1, length), length) == tuple(shape):
        return mask.reshape(shape)
    if callable(frames) and len(mask) == shape[0] and length > shape[1]:
        made = frames(shape[1], mask)
        return made if isinstance(made, Tensor) and made.shape == shape else None
    return None
