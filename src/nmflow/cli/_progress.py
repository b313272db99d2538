"""Progress bars with the time left, for commands that train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nmflow.experiments.run_folder import RunFolder

if TYPE_CHECKING:
    from nmflow.experiments.config import Run
    from nmflow.experiments.training import Progress as Step


class Watcher:
    """One bar for all runs, and one for each run at work."""

    def __init__(self, runs: Sequence[Run], folder: Path, console: Console) -> None:
        self.titles = {
            run.id: f"{run.recipe.title} {run.pattern_text} seed {run.seed}" for run in runs
        }
        pending = [run for run in runs if not RunFolder(folder / run.id).finished]
        self.bars = Progress(
            TextColumn("{task.description:<40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        # 0 where a budget decides, until the run says how many steps it buys.
        self.expected = {run.id: run.training.steps for run in pending}
        self.done: set[str] = set()
        self.all = self.bars.add_task("all steps", total=self._total(), note="")
        self.tasks: dict[str, Any] = {}
        self.steps: dict[str, int] = {}

    def __enter__(self) -> Watcher:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def notify(self, now: Step) -> None:
        """Move the bars to where a run is."""
        if self.expected.get(now.run) != now.steps:
            self.expected[now.run] = now.steps
            self.bars.update(self.all, total=self._total())
        if now.run not in self.tasks:
            title = self.titles[now.run]
            self.tasks[now.run] = self.bars.add_task(title, total=now.steps, note="")
        note = f"loss {now.loss:.3f}" if now.loss is not None else ""
        fields: Any = {"note": note} if note else {}
        self.bars.update(self.tasks[now.run], completed=now.step, **fields)
        self.bars.update(self.all, advance=now.step - self.steps.get(now.run, 0))
        self.steps[now.run] = now.step
        if now.step >= now.steps:
            self.done.add(now.run)
            note = f"{len(self.done)}/{len(self.expected)} runs"
            fields = {"note": note}
            self.bars.update(self.all, **fields)
            self.bars.update(self.tasks[now.run], visible=False)

    def _total(self) -> float | None:
        """Steps of all runs; one whose steps are not known yet counts as the mean of the others."""
        known = [steps for steps in self.expected.values() if steps]
        return sum(known) * len(self.expected) / len(known) if known else None
