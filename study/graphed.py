"""Forward and backward of a training step as CUDA graphs: a small network waits for launches.

A step of MiniLM launches about 1,500 kernels of a few microseconds, so that the host decides its
time. A graph launches them at once. What it computes is the same: the recipe, the clipping and the
optimizer run as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

WIDTH = 16
"""Batches are padded to a multiple of so many tokens: a graph is recorded for each shape."""


class Graphed:
    """A mixin whose `training_step` replays a graph; the first step of each shape runs as it is.

    Gradients are not accumulated over micro-batches.
    """

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """`Trainer.training_step`; the gradients lie in memory of the graph."""
        trainer: Any = self
        own: Any = super()
        steps = self.__dict__.setdefault("graphed_steps", {})
        batch = trainer._prepare_inputs(widened(inputs, model.config.pad_token_id))  # type: ignore[union-attr,arg-type]
        items = num_items_in_batch
        shape = tuple((name, tuple(x.shape)) for name, x in batch.items())
        if shape not in steps:  # libraries choose their kernels before anything is recorded
            steps[shape] = None
            return own.training_step(model, batch, items)
        if steps[shape] is None:
            steps[shape] = self._recorded(model, batch, items)
        return steps[shape](batch, items)

    def _recorded(
        self, model: nn.Module, batch: dict[str, Tensor], items: Any
    ) -> Callable[[dict[str, Tensor], Any], Tensor]:
        """Record the step of one shape."""
        trainer: Any = self
        model.train()
        given = {**batch, "items": items} if isinstance(items, Tensor) else batch

        def loss(held: dict[str, Tensor]) -> Tensor:
            rest = {name: x for name, x in held.items() if name != "items"}
            with trainer.compute_loss_context_manager():
                found = trainer.compute_loss(
                    model, rest, num_items_in_batch=held.get("items", items)
                )
            return found

        params = [p for p in model.parameters() if p.requires_grad]
        if "graphed_pool" not in self.__dict__:
            cuda = torch.cuda.is_available()
            self.graphed_pool = torch.cuda.graph_pool_handle() if cuda else None
        replay = backward_of(loss, given, params, self.graphed_pool)

        def step(batch: dict[str, Tensor], now: Any) -> Tensor:
            if isinstance(items, Tensor):
                return replay({**batch, "items": now})
            if now != items:
                raise ValueError(f"num_items_in_batch is {now!r}, and {items!r} was recorded")
            return replay(batch)

        return step


def backward_of(
    loss: Callable[[dict[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    params: Sequence[nn.Parameter],
    pool: Any = None,
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Record a loss of inputs of one shape, and its gradients, which every call puts in place.

    Graphs that never run at once may share a `pool` of memory.
    """
    held = {name: x.clone() for name, x in inputs.items()}

    def work() -> list[Tensor | None]:
        for p in params:
            p.grad = None  # the graph's own memory takes the gradients
        found = loss(held)
        found.backward()
        return [found.detach(), *(p.grad for p in params)]

    replay, (found, *grads) = record(work, pool)

    def step(inputs: Mapping[str, Tensor]) -> Tensor:
        for name, x in inputs.items():
            held[name].copy_(x)
        replay()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        assert found is not None
        return found.clone()

    return step


def record(
    work: Callable[[], list[Tensor | None]], pool: Any = None
) -> tuple[Callable[[], None], list[Tensor | None]]:
    """A graph of `work`, and the tensors that every replay fills; recording computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        made = work()
    return graph.replay, made


def widened(inputs: Mapping[str, Any], token: int) -> dict[str, Any]:
    """A batch of sequences, padded to a multiple of `WIDTH` tokens."""
    made = dict(inputs)
    more = -made["input_ids"].shape[1] % WIDTH
    made["input_ids"] = pad(made["input_ids"], (0, more), value=token)
    made["attention_mask"] = pad(made["attention_mask"], (0, more))
    return made
