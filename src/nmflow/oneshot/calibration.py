"""Run calibration batches through a network layer by layer, and collect its weights' inputs."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import WeightError
from nmflow.flow.casts import forget_casts
from nmflow.oneshot.finished import Finished, Unlike
from nmflow.oneshot.watch import Done, Seen, Watch
from nmflow.select.modules import check_batch
from nmflow.select.target import Target

_NOTHING = contextlib.nullcontext()
# Weights of an encoder, and those of a decoder that read what an encoder says.
_ENCODER = re.compile(
    r"(^|\.)encoder\.|(encoder_attn|encdecattention|cross_?att\w*)\.(\w+\.)?"
    r"(k|v|key|value|k_proj|v_proj)\.",
    re.IGNORECASE,
)
_DECODED = ("decoder_input_ids", "labels")
_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")

Inputs = dict[tuple[str, int, int, int], Tensor]
"""Sums over tokens (of squares, or a Gram matrix) by parameter, matrix, first and last row."""


class Calibration:
    """Batches, and the order in which a network uses its targets.

    Args:
        model: the network, run in evaluation mode and without gradients.
        batches: each has keyword arguments, positional ones, or a tensor; read once per layer.
        targets: the weights.
        whole: collect whole Gram matrices, not only the sums of squares on their diagonal.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], targets: Sequence[Target], whole: bool
    ) -> None:
        if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
            raise WeightError(
                f"calibration is a {type(batches).__name__}: give a list of batches or a "
                "DataLoader, such as [batch] for a single one"
            )
        if iter(batches) is batches:
            raise WeightError(
                "calibration is an iterator, which can be read only once: give a list or a "
                "DataLoader, since every layer is calibrated after those before it are pruned"
            )
        self.model, self.batches, self.whole = model, batches, whole
        self.params = dict(model.named_parameters())
        self.targets = targets
        self._finished: Finished | None = Finished(model)

    def layers(self) -> Iterator[tuple[list[Target], Inputs]]:
        """Each layer's targets in the order of the forward pass, with their inputs as they are now.

        A layer is a block that repeats, such as `layers.3`. The caller prunes its weights before it
        asks for the next one. Each layer costs a forward pass that ends after it, in which finished
        blocks repeat their outputs.
        """
        order: list[str] = []
        first = next(iter(self.batches), None)
        if first is None:
            raise WeightError("calibration holds no batch: give at least one")
        self._run([first], self.targets, lambda seen: order.append(seen.name))
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(_block(target.name), []).append(target)
        used = dict.fromkeys(map(_block, order))
        done: list[str] = []
        for key in [*used, *(key for key in groups if key not in used)]:
            names = {target.name for target in groups[key]}
            last = max((i for i, name in enumerate(order) if name in names), default=len(order))
            later = set(order[last + 1 :]) - set(order[: last + 1])
            yield groups[key], self._inputs(groups[key], later, done)
            done.append(key)

    def _inputs(self, targets: list[Target], later: set[str], done: list[str]) -> Inputs:
        if self._finished is not None:
            # Whatever the reason is, a pass that computes everything raises it again.
            with contextlib.suppress(Exception):
                if len(done) == 2:
                    self._check(self._finished, targets, later, done)
                found = self._pass(self.batches, targets, later, done)
                self._finished.end_pass()
                return found
            self._finished = None
        return self._pass(self.batches, targets, later)

    def _check(
        self, finished: Finished, targets: list[Target], later: set[str], done: list[str]
    ) -> None:
        """Raise `Unlike` if blocks influence later ones by more than their outputs."""
        first = list(itertools.islice(self.batches, 1))
        found = self._pass(first, targets, later, done)
        finished.forget_pass()
        whole = self._pass(first, targets, later)
        if list(found) != list(whole) or any(not found[k].equal(whole[k]) for k in found):
            raise Unlike

    def _pass(
        self,
        batches: Iterable[Any],
        targets: list[Target],
        later: set[str],
        done: list[str] | None = None,
    ) -> Inputs:
        found: Inputs = {}
        names = {target.name for target in targets}

        def receive(seen: Seen) -> None:
            if seen.name not in names:
                if seen.name in later:
                    raise Done
                return
            if seen.inputs.is_meta:
                raise Unlike
            x = seen.inputs.to(torch.promote_types(seen.inputs.dtype, torch.float32))
            part = x.T @ x if self.whole else x.square().sum(0)
            key = (seen.name, seen.matrix, seen.start, seen.stop)
            found[key] = found[key] + part if key in found else part

        self._run(batches, self.targets, receive, done)
        return found

    def _run(
        self,
        batches: Iterable[Any],
        targets: Sequence[Target],
        receive: Callable[[Seen], None],
        done: list[str] | None = None,
    ) -> None:
        modes = {module: module.training for module in self.model.modules()}
        fast = torch.backends.mha.get_fastpath_enabled()
        self.model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the products of attention
        try:
            for index, batch in enumerate(batches):
                counts, decoded = _counting(batch), _decodes(self.model, batch)

                def kept(
                    seen: Seen, counts: Tensor | None = counts, decoded: bool = decoded
                ) -> None:
                    if decoded and not _ENCODER.search(seen.name):
                        counts = None
                    if counts is not None and counts.numel() == seen.inputs.shape[0]:
                        seen = seen._replace(inputs=seen.inputs[counts])
                    receive(seen)

                finished = None if done is None else self._finished
                forget_casts()
                with (
                    torch.no_grad(),
                    contextlib.suppress(Done),
                    finished.around(done or [], index, batch) if finished else _NOTHING,
                    Watch(self.params, targets, kept),
                ):
                    _call(self.model, batch)
        finally:
            for module, training in modes.items():
                module.training = training
            torch.backends.mha.set_fastpath_enabled(fast)


def of(target: Target, matrix: int, inputs: Inputs) -> Tensor:
    """The collected inputs of one matrix of a target.

    Raises:
        WeightError: it has none, or its rows have different ones.
    """
    start, stop = target.rows or (0, target.shape[target.out_dim])
    mine = {k[2:]: v for k, v in inputs.items() if k[:2] == (target.name, matrix)}
    some = [rows for rows in mine if rows[0] < stop and rows[1] > start]
    if any(rows[0] > start or rows[1] < stop for rows in some):
        raise WeightError(
            f"'{target.label}' is multiplied in parts, each with inputs of its own: exclude it, or "
            "prune it by magnitude"
        )
    which = f"matrix {matrix} of '{target.label}'" if target.stacked else f"'{target.label}'"
    if not some or not any(bool(mine[rows].any()) for rows in some):
        raise WeightError(
            f"{which} saw no input in the calibration: give more batches; or, if its module copies "
            "it first or passes it to a fused kernel (an LSTM), exclude it "
            "or prune it by magnitude"
        )
    return sum(mine[rows] for rows in some[1:]) + mine[some[0]]


def _block(name: str) -> str:
    """The path up to its first number: `bert.encoder.layer.3`; the whole name if it has none."""
    found = _BLOCK.match(name)
    return found[0] if found else name


_MEND = (
    "give batches of its inputs alone, without labels, such as [x for x, y in loader]; a mapping "
    "gives keyword arguments, a tuple positional ones"
)


def _call(model: nn.Module, batch: Any) -> None:
    args, named = (), {}
    if isinstance(batch, Mapping):
        named = batch
    else:
        args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    check_batch(model, args, named, WeightError, _MEND)
    model(*args, **named)


def _counting(batch: Any) -> Tensor | None:
    """Which tokens are not padding, if the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.flatten() != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _decodes(model: nn.Module, batch: Any) -> bool:
    """Whether an encoder-decoder gets as many tokens on both sides, which tells them not apart."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    given = [batch[n] for n in _DECODED if isinstance(batch, Mapping) and batch.get(n) is not None]
    return isinstance(mask, Tensor) and all(x.numel() == mask.numel() for x in given)
