"""The tasks of the study: their figures, and the dense network that each sparse one has to beat."""

from __future__ import annotations

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
    """

    name: str
    title: str
    metric: str
    claimed: float
    field: str | None
    width: int
    power: int = 1

    def narrower(self, pattern: str) -> int:
        """The width at which a dense network has the FLOPs of the sparse one."""
        n, m = map(int, pattern.split(":"))
        return round(self.width * (n / m) ** (1 / self.power))

    def rival(self, pattern: str) -> str:
        """What the tables call that network."""
        return f"Dense, {'FF' if self.power == 1 else 'width'} {self.narrower(pattern)}"


TASKS = (
    Task("lm", "characters, GPT-2", "test_accuracy", 5.0, "model.fields.n_inner", 256),
    Task("lstm", "characters, LSTM", "test_accuracy", 5.0, "model.fields.hidden_size", 128, 2),
    Task("vit", "CIFAR-10, ViT", "test_accuracy", 2.0, "model.fields.intermediate_size", 256),
    Task("resnet", "CIFAR-10, ResNet", "test_accuracy", 2.0, None, 64, 2),
    Task("sst2", "SST-2, BERT", "test_accuracy", 5.0, "model.fields.intermediate_size", 256),
    Task("multi30k", "Multi30k, Marian", "test_bleu", 5.0, None, 1024),
)
BY_NAME = {task.name: task for task in TASKS}
