"""`Distiller`: a teacher beside a training step, and the loss that both make."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.distill.outputs import PROBLEMS, check_outputs
from nmflow.distill.shift import named_causal, shift_of
from nmflow.distill.terms import config_of, hidden_term, logits_term, share_of
from nmflow.errors import DistillError
from nmflow.flow.owners import is_owned
from nmflow.flow.sharding import sharded
from nmflow.numbers import check_not_negative, check_positive
from nmflow.select.modules import check_batch, check_model, inside

log = logging.getLogger("nmflow")


class Distiller:
    r"""Train a network to imitate its dense self: `loss = distiller(model, batch).loss`.

    `L = task · L_task + logits · L_logits + hidden · L_hidden`, with `logit_loss` and
    `hidden_loss`. The teacher runs without gradients, in evaluation mode, under the caller's
    autocast and on the student's device. It costs one forward pass per step and its own memory:
    unsharded on every process, unless you shard it like the student. A `Distiller` is no module, so
    a module that holds one neither trains nor saves the teacher. A model that Accelerate prepared
    has its mixed precision inside, which does not reach the teacher: call the distiller under
    `accelerator.autocast()`.

    `L_logits` is `logit_loss`, or for a head whose labels are independent `multilabel_loss`, and
    for one of values `regression_loss`; of several heads it is the mean. Each is a mean over the
    positions of a batch. `L_hidden` is a ratio of sums over them, so over micro-batches or
    processes, whose losses are averaged, its gradient is that of the mean of their ratios, not of
    the ratio over all. If the batch has `num_items_in_batch`, by which the task's own loss is
    divided, the other terms count by the batch's share of these items.

    Padding and labels of -100 do not count: logits count where their labels do, if they have one at
    each position, else where the attention mask is 1, and hidden states where the attention mask is
    1. Whether a label belongs to the logits one position before it, as in causal language models,
    the teacher's own loss tells: two more forward passes of it at the first batch.

    Args:
        teacher: the dense network, which the call freezes.
        task: weight of the network's own loss; 0 if the data have no labels.
        logits: weight of the loss on logits.
        hidden: weight of the loss on hidden states.
        temperature: T of the loss on logits.
        problem: what the logits are: `"single_label_classification"`,
            `"multi_label_classification"` or `"regression"`; None decides as transformers does, by
            the teacher's config and the labels.

    Raises:
        DistillError: a weight below 0, all of them 0, a temperature that is not above 0, or an
            unknown problem.

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
        problem: str | None = None,
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
        if problem is not None and problem not in PROBLEMS:
            said = ", ".join(PROBLEMS)
            raise DistillError(f"problem is {problem!r}: choose from {said}, or None")
        self.task, self.logits, self.hidden = task, logits, hidden
        self.temperature, self.problem = temperature, problem
        self._said = False
        self._shifts: bool | None = None
        self._checked = 0
        self._froze = {param for param in teacher.parameters() if param.requires_grad}
        self.teacher = teacher.requires_grad_(False).eval()

    @classmethod
    def of(cls, model: nn.Module, **options: Any) -> Distiller:
        """Take a frozen copy of `model` as the teacher; call it before `nmflow.attach`.

        Of a `DistributedDataParallel` or a compiled network it copies what is inside, so every
        process has its own.

        Raises:
            DistillError: the model cannot be copied, or its weights are under a recipe or sharded.
        """
        check_model(model, DistillError)
        model = inside(model)
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
        self.check(model, batch)
        outputs = model(**batch, **self._asked)
        check_outputs(outputs, "student")
        self._say_precision(model, _device(outputs).type)
        outputs["loss"] = self.loss(outputs, batch)
        return outputs

    def check(self, model: nn.Module, batch: Any) -> None:
        """Raise unless the teacher is apart from the student, and the student takes the batch.

        Raises:
            DistillError: they share what the teacher has frozen, or the batch does not fit.
        """
        check_model(model, DistillError)
        if not isinstance(batch, Mapping):
            raise DistillError(
                f"batch is a {type(batch).__name__}: give a mapping of keyword arguments"
            )
        check_batch(model, (), {**batch, **self._asked}, DistillError, _MEND)
        if self._checked == id(model):
            return
        theirs = set(self.teacher.modules())
        if inside(self.teacher) is inside(model):
            raise DistillError(
                "the teacher is the student itself, now frozen: make a copy before you train, with "
                "Distiller.of(model)"
            )
        shared = [n for n, module in model.named_modules() if module in theirs]
        shared += [n for n, param in model.named_parameters() if param in self._froze]
        if shared:
            raise DistillError(
                f"the teacher and the student share '{shared[0] or type(model).__name__}', which "
                "is frozen now: make the teacher a copy, with Distiller.of(model)"
            )
        self._checked = id(model)

    def loss(
        self, outputs: Any, batch: Mapping[str, Any], *, share: float | Tensor = 1.0
    ) -> Tensor:
        """The whole loss of a student's outputs.

        Args:
            outputs: of the student on `batch`, with hidden states where `hidden` is not 0.
            batch: the student's keyword arguments, with `num_items_in_batch` where its own loss is
                divided by that.
            share: what the distillation terms are multiplied with; the task's own loss is taken as
                it is.
        """
        check_outputs(outputs, "student")
        own = outputs.get("loss")
        if self.task and own is None:
            raise DistillError(
                "the student's outputs have no loss: put labels into the batch, or set task=0"
            )
        # An encoder-decoder makes its decoder's inputs of the labels; others need none.
        left_out = ("num_items_in_batch", *(() if self._encodes else ("labels", "shift_labels")))
        given = {name: value for name, value in batch.items() if name not in left_out}
        given |= self._asked
        check_batch(self.teacher, (), given, DistillError, _MEND)
        with torch.no_grad():
            self._follow(_device(outputs))
            told = self.teacher(**given)
        check_outputs(told, "teacher")
        total: Any = torch.zeros((), device=_device(outputs))
        counted = self.logits or "num_items_in_batch" in batch
        shifts = bool(counted) and self._shifted(told, given, batch.get("labels"))
        if self.logits:
            total = total + self.logits * logits_term(
                outputs, told, batch, self.teacher,
                problem=self.problem, temperature=self.temperature, shifts=shifts,
            )  # fmt: skip
        if self.hidden:
            total = total + self.hidden * hidden_term(outputs, told, batch, self.teacher)
        total = share * share_of(batch, shifts) * total
        return total + self.task * own if self.task else total

    def _shifted(self, told: Mapping[str, Any], given: Mapping[str, Any], labels: Any) -> bool:
        """Whether a label belongs to the logits one position before it."""
        logits = told.get("logits")
        if self._encodes or not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
            return False
        if labels.ndim < 2 or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            return False
        if self._shifts is None and labels.shape[-1] > 1:
            self._shifts = shift_of(self.teacher, logits, given, labels)
        return named_causal(self.teacher) if self._shifts is None else self._shifts

    def _say_precision(self, model: nn.Module, device: str) -> None:
        # Accelerate keeps the forward that it wraps in autocast under this name.
        hidden = hasattr(model, "_original_forward") and not torch.is_autocast_enabled(device)
        if hidden and not self._said:
            log.warning(
                "the teacher runs in float32, since Accelerate put the mixed precision inside the "
                "model's own forward: call the distiller under accelerator.autocast()"
            )
            self._said = True

    @property
    def _asked(self) -> dict[str, Any]:
        return {"output_hidden_states": True} if self.hidden else {}

    @property
    def _encodes(self) -> bool:
        return bool(getattr(config_of(self.teacher), "is_encoder_decoder", False))

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


def _device(outputs: Mapping[str, Any]) -> torch.device:
    return next(x.device for x in outputs.values() if isinstance(x, Tensor))
