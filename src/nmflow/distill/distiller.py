"""`Distiller`: a teacher beside a training step, and the loss that both make."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nmflow.distill.losses import hidden_loss, logit_loss
from nmflow.errors import DistillError
from nmflow.flow.owners import is_owned
from nmflow.flow.sharding import sharded
from nmflow.numbers import check_not_negative, check_positive
from nmflow.select.modules import check_batch, check_model

log = logging.getLogger("nmflow")

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""


class Distiller:
    r"""Train a network to imitate its dense self: `loss = distiller(model, batch).loss`.

    `L = task · L_task + logits · L_logits + hidden · L_hidden`, with `logit_loss` and
    `hidden_loss`. The teacher runs without gradients, in evaluation mode, under the caller's
    autocast and on the student's device. It costs one forward pass per step and its own memory:
    unsharded on every process, unless you shard it like the student. A `Distiller` is no module, so
    a module that holds one neither trains nor saves the teacher. A model that Accelerate prepared
    has its mixed precision inside, which does not reach the teacher: call the distiller under
    `accelerator.autocast()`.

    `L_logits` is a mean over the positions of a batch. `L_hidden` is a ratio of sums over them, so
    over micro-batches or processes, whose losses are averaged, its gradient is that of the mean of
    their ratios, not of the ratio over all.

    Padding and labels of -100 do not count: logits of a causal language model count at positions
    that predict a counted label, logits of a token classifier at counted labels, and hidden states
    where the attention mask is 1.

    Args:
        teacher: the dense network, which the call freezes.
        task: weight of the network's own loss; 0 if the data have no labels.
        logits: weight of the loss on logits.
        hidden: weight of the loss on hidden states.
        temperature: T of the loss on logits.

    Raises:
        DistillError: a weight below 0, all of them 0, or a temperature that is not above 0.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, **shape))
        >>> distiller = Distiller.of(model)  # a frozen copy: the dense network as it is now
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
        >>> distiller(model, batch).loss.backward()

    References:
        arXiv 1503.02531 (logits), arXiv 2310.06927 (hidden states, and both on sparse networks).
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        task: float = 0.5,
        logits: float = 0.5,
        hidden: float = 1.0,
        temperature: float = 2.0,
    ) -> None:
        check_model(teacher, DistillError, "teacher")
        for name, param in teacher.named_parameters():
            if is_owned(param):
                raise DistillError(
                    f"the teacher's '{name}' is under a recipe, so that it is no dense network and "
                    "cannot be frozen: make it with Distiller.of(model), before nmflow.attach"
                )
        weights = {"task": task, "logits": logits, "hidden": hidden}
        for name, weight in weights.items():
            check_not_negative(name, weight, DistillError)
        if logits == 0 and hidden == 0:
            raise DistillError("logits and hidden are both 0: give one of them a weight")
        check_positive("temperature", temperature, DistillError)
        self.task, self.logits, self.hidden = task, logits, hidden
        self.temperature = temperature
        self._said = False
        self.teacher = teacher.requires_grad_(False).eval()

    @classmethod
    def of(cls, model: nn.Module, **options: float) -> Distiller:
        """Take a frozen copy of `model` as the teacher; call it before `nmflow.attach`.

        Of a `DistributedDataParallel` it copies the network inside, so every process has its own.

        Raises:
            DistillError: the model cannot be copied, or its weights are under a recipe or sharded.
        """
        check_model(model, DistillError)
        model = model.module if isinstance(model, DistributedDataParallel) else model
        for name, param in model.named_parameters():
            if is_owned(param):
                raise DistillError(
                    f"'{name}' is under a recipe, so a copy would be sparse: take the teacher "
                    "before nmflow.attach"
                )
            if sharded(param):
                raise DistillError(
                    f"'{name}' is sharded: take the teacher of the model before it is sharded, or "
                    "shard a second network and pass that to Distiller"
                )
        try:
            teacher = copy.deepcopy(model)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise DistillError(
                f"model cannot be copied ({error}): build the teacher anew, load the model's state "
                "into it, and pass that to Distiller"
            ) from error
        return cls(teacher, **options)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Run the student on a batch, and put the loss of both into its outputs.

        Args:
            model: the student, of transformers or with outputs like theirs (`logits`, and `loss`
                and `hidden_states` where they are used), wrapped or not.
            batch: its keyword arguments.

        Returns:
            The student's outputs; `loss` is the whole loss.
        """
        check_model(model, DistillError)
        if not isinstance(batch, Mapping):
            raise DistillError(
                f"batch is a {type(batch).__name__}: give a mapping of keyword arguments"
            )
        if self.teacher is (model.module if isinstance(model, DistributedDataParallel) else model):
            raise DistillError(
                "the teacher is the student itself, now frozen: make a copy before you train, with "
                "Distiller.of(model)"
            )
        more = {"output_hidden_states": True} if self.hidden else {}
        check_batch(model, (), {**batch, **more}, DistillError, _MEND)
        outputs = model(**batch, **more)
        self._say_precision(model, outputs["logits"].device.type)
        outputs["loss"] = self.loss(outputs, batch)
        return outputs

    def loss(
        self, outputs: Any, batch: Mapping[str, Any], *, share: float | Tensor = 1.0
    ) -> Tensor:
        """The whole loss of a student's outputs.

        Args:
            outputs: of the student on `batch`, with hidden states where `hidden` is not 0.
            batch: the student's keyword arguments.
            share: what the distillation terms are multiplied with, such as this micro-batch's
                share of an accumulated batch; the task's own loss is taken as it is.
        """
        own = outputs.get("loss")
        if self.task and own is None:
            raise DistillError(
                "the student's outputs have no loss: put labels into the batch, or set task=0"
            )
        more = {"output_hidden_states": True} if self.hidden else {}
        # An encoder-decoder makes its decoder's inputs of the labels; others need none.
        left_out = ("num_items_in_batch", *(() if self._encodes else ("labels",)))
        given = {name: value for name, value in batch.items() if name not in left_out}
        check_batch(self.teacher, (), {**given, **more}, DistillError, _MEND)
        with torch.no_grad():
            self._follow(outputs["logits"].device)
            told = self.teacher(**given, **more)
        total = outputs["logits"].new_zeros((), dtype=torch.float32)
        if self.logits:
            s, t, mask = _aligned(outputs["logits"], told["logits"], batch, self._causal)
            total = total + self.logits * logit_loss(s, t, temperature=self.temperature, mask=mask)
        if self.hidden:
            states = [_hidden(one, who) for one, who in ((outputs, "student"), (told, "teacher"))]
            masks = [batch.get("attention_mask"), _counting(batch.get("labels"))]
            for s, t, mask in zip(*states, masks, strict=False):
                part = hidden_loss(s, t, mask=_fitting(mask, s[0])) / len(states[0])
                total = total + self.hidden * part
        total = share * total
        return total + self.task * own if self.task else total

    def _say_precision(self, model: nn.Module, device: str) -> None:
        # Accelerate keeps the forward that it wraps in autocast under this name.
        inside = hasattr(model, "_original_forward") and not torch.is_autocast_enabled(device)
        if inside and not self._said:
            log.warning(
                "the teacher runs in float32, since Accelerate put the mixed precision inside the "
                "model's own forward: call the distiller under accelerator.autocast()"
            )
            self._said = True

    @property
    def _causal(self) -> bool:
        """Whether a label belongs to the logits one position before it."""
        kind = type(self.teacher).__name__
        return kind.endswith(("ForCausalLM", "LMHeadModel")) and not self._encodes

    @property
    def _encodes(self) -> bool:
        config = getattr(self.teacher, "config", None)
        return bool(getattr(config, "is_encoder_decoder", False))

    def _follow(self, device: torch.device) -> None:
        first = next(self.teacher.parameters(), None)
        if first is not None and first.device != device and first.device.type != "meta":
            self.teacher.to(device)
        if self.teacher.training:  # a callback, or `model.train()` of a network that holds it
            self.teacher.eval()


_MEND = (
    "take a network with arguments and outputs like those of transformers (hidden=0 if it takes no "
    "output_hidden_states), or the losses alone, nmflow.distill.logit_loss and hidden_loss"
)


def _aligned(
    student: Tensor, teacher: Tensor, batch: Mapping[str, Any], causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits at the positions that count, and which of them do."""
    labels = batch.get("labels")
    if student.ndim < 3:  # one prediction an example
        return student, teacher, None
    if labels is not None and labels.shape == student.shape[:-1]:
        if causal:
            return student[:, :-1], teacher[:, :-1], _counting(labels[:, 1:])
        return student, teacher, _counting(labels)
    return student, teacher, _fitting(batch.get("attention_mask"), student)


def _hidden(outputs: Any, who: str) -> list[list[Tensor]]:
    """The hidden states: of an encoder and a decoder, each of its own."""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    found = [list(outputs[name]) for name in names if outputs.get(name) is not None]
    if not found:
        raise DistillError(
            f"the {who}'s outputs have no hidden states: pass output_hidden_states=True, or set "
            "hidden=0"
        )
    return found


def _counting(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels != IGNORED


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The attention mask, where its positions are those of `x`."""
    if mask is None or mask.ndim != 2 or mask.shape != x.shape[:2]:
        return None
    return mask
