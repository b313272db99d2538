"""The tasks of the study: their figures, and the dense network that each sparse one has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """A task of the protocol.

    Attributes:
        name: of its files.
        title: as pages write it.
        metric: its figure, of which more is better; pages show it in points.
        claimed: the paper's gain in such a task, in points.
        fields: what a narrower network has less of, dotted keys of the configuration.
        width: how much the study's network has.
        multiples: of the width, the entries of a field that is a list; empty for a number.
        counted: the narrower widths by pattern, where `nmflow.cost` says more than a formula.
        power: the FLOPs of the sparse weights grow with the width to this power.
        linear: FLOPs of the rest that grow with the width, as a multiple of those of the sparse
            weights at width 1: the output layer of an LSTM, as wide as its state.
    """

    name: str
    title: str
    metric: str
    claimed: float
    fields: tuple[str, ...]
    width: int
    power: int = 1
    linear: float = 0.0
    multiples: tuple[int, ...] = ()
    counted: Mapping[str, int] = field(default_factory=dict)

    def narrower(self, pattern: str) -> int:
        """The width at which a dense network has the FLOPs of the sparse one."""
        if self.counted:
            return self.counted[pattern]
        n, m = map(int, pattern.split(":"))
        if self.power == 1:
            return round(self.width * n / m)
        # w² + linear·w = width²·N/M + linear·width
        total = self.width**2 * n / m + self.linear * self.width
        return round((math.sqrt(self.linear**2 + 4 * total) - self.linear) / 2)

    def narrow(self, pattern: str) -> dict[str, int | list[int]]:
        """The keys of that network's configuration."""
        width = self.narrower(pattern)
        value = [width * each for each in self.multiples] or width
        return dict.fromkeys(self.fields, value)

    def rival(self, pattern: str) -> str:
        """What the tables call that network."""
        return f"Dense, {'FF' if self.power == 1 else 'width'} {self.narrower(pattern)}"


TASKS = (
    Task("lm", "characters, GPT-2", "test_accuracy", 5.0, ("model.fields.n_inner",), 256),
    # 8·w² FLOPs in the LSTM and 104·w, of 104 characters, in the output layer.
    Task(
        "lstm", "characters, LSTM", "test_accuracy", 5.0, ("model.fields.hidden_size",), 128, 2, 13
    ),
    Task("vit", "CIFAR-10, ViT", "test_accuracy", 2.0, ("model.fields.intermediate_size",), 256),
    Task(
        "resnet",
        "CIFAR-10, ResNet",
        "test_accuracy",
        2.0,
        ("model.fields.hidden_sizes",),
        128,
        2,
        multiples=(1, 2, 4),
        counted={"2:4": 88, "1:4": 64, "1:8": 44, "1:16": 28, "1:32": 20},
    ),
    Task("sst2", "SST-2, BERT", "test_accuracy", 5.0, ("model.fields.intermediate_size",), 256),
    Task("glue", "GLUE pooled, BERT", "test_score", 5.0, ("model.fields.intermediate_size",), 256),
    Task(
        "multi30k",
        "Multi30k, Marian",
        "test_bleu",
        5.0,
        ("model.fields.encoder_ffn_dim", "model.fields.decoder_ffn_dim"),
        256,
    ),
)
BY_NAME = {task.name: task for task in TASKS}
