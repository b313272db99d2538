"""The tasks of the study: their figures, and the dense network that each sparse one has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task of the protocol.

    Attributes:
        name: of its files.
        title: as pages write it.
        metric: its figure, of which more is better; pages show it in points.
        claimed: the paper's gain in such a task, in points.
        field: what a narrower network has less of, a dotted key of the configuration; None where
            several keys have to change, and its dense sweep is written by hand.
        width: how much the study's network has.
        power: the FLOPs of the sparse weights grow with the width to this power.
        linear: FLOPs of the rest that grow with the width, as a multiple of those of the sparse
            weights at width 1: the output layer of an LSTM, as wide as its state.
    """

    name: str
    title: str
    metric: str
    claimed: float
    field: str | None
    width: int
    power: int = 1
    linear: float = 0.0

    def narrower(self, pattern: str) -> int:
        """The width at which a dense network has the FLOPs of the sparse one."""
        n, m = map(int, pattern.split(":"))
        if self.power == 1:
            return round(self.width * n / m)
        # w² + linear·w = width²·N/M + linear·width
        total = self.width**2 * n / m + self.linear * self.width
        return round((math.sqrt(self.linear**2 + 4 * total) - self.linear) / 2)

    def rival(self, pattern: str) -> str:
        """What the tables call that network."""
        return f"Dense, {'FF' if self.power == 1 else 'width'} {self.narrower(pattern)}"


TASKS = (
    Task("lm", "characters, GPT-2", "test_accuracy", 5.0, "model.fields.n_inner", 256),
    # 8·w² FLOPs in the LSTM and 104·w, of 104 characters, in the output layer.
    Task("lstm", "characters, LSTM", "test_accuracy", 5.0, "model.fields.hidden_size", 128, 2, 13),
    Task("vit", "CIFAR-10, ViT", "test_accuracy", 2.0, "model.fields.intermediate_size", 256),
    Task("resnet", "CIFAR-10, ResNet", "test_accuracy", 2.0, None, 64, 2),
    Task("sst2", "SST-2, BERT", "test_accuracy", 5.0, "model.fields.intermediate_size", 256),
    Task("multi30k", "Multi30k, Marian", "test_bleu", 5.0, None, 1024),
)
BY_NAME = {task.name: task for task in TASKS}
