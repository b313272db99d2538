"""Progress of commands that train: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
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

INTERVAL = 30.0
"""Seconds between two lines of one run."""


def watcher(runs: Sequence[Run], folder: Path, console: Console) -> Bars | Lines:
    """Bars or lines, by the console; a quiet console shows neither."""
    pending = [run for run in runs if not RunFolder(folder / run.id).finished]
    return Bars(pending, console) if console.is_terminal else Lines(pending, console)


def stopping_soon() -> None:
    """Print from a signal handler that work continues to its next save."""
    os.write(2, b"\nnmflow: stopping when a checkpoint is saved; once more stops at once\n")


def title(run: Run) -> str:
    """A readable name of a run."""
    return f"{run.recipe.title} {run.pattern_text} seed {run.seed}"


class Lines:
    """A line of log where a run begins, changes its phase or ends, and every `INTERVAL` seconds.

    Args:
        runs: the runs that are not finished.
        console: where the lines go.
        clock: returns the seconds of a monotonic clock.
    """

    def __init__(
        self, runs: Sequence[Run], console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.titles = {run.id: title(run) for run in runs}
        self.console, self.clock = console, clock
        self.seen: dict[str, _Seen] = {}
        self.done: set[str] = set()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def notify(self, now: Step) -> None:
        """Write a line if one is due."""
        at = self.clock()
        run = self.seen.get(now.run)
        begins = run is None
        if run is None:
            run = self.seen[now.run] = _Seen(now.step, at)
        run.loss = run.loss if now.loss is None else now.loss
        ends = now.step >= now.steps and now.run not in self.done
        if ends:
            self.done.add(now.run)
        phase = now.phase is not None and now.phase != run.phase
        run.phase = now.phase or run.phase
        if begins or ends or (now.step < now.steps and (phase or at - run.said >= INTERVAL)):
            run.said = at
            self._say(now, run, at, ends)

    def _say(self, now: Step, run: _Seen, at: float, ends: bool) -> None:
        parts = [f"step {now.step:,}/{now.steps:,}"]
        if run.phase:
            parts.append(run.phase)
        if run.loss is not None:
            parts.append(f"loss {run.loss:.4f}")
        done = now.step - run.first
        if ends:
            parts.append(f"trained, {len(self.done)} of {len(self.titles)} runs")
        elif done > 0:
            parts.append(f"{_span((at - run.began) / done * (now.steps - now.step))} left")
        self.console.print(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.titles[now.run]}: {', '.join(parts)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


class _Seen:
    """What was last printed of a run."""

    def __init__(self, first: int, at: float) -> None:
        self.first, self.began, self.said = first, at, at
        self.loss: float | None = None
        self.phase: str | None = None


def _span(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


class Bars:
    """One bar for all runs, and one for each run at work.

    Args:
        runs: the runs that are not finished.
        console: where the bars are drawn.
    """

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        self.titles = {run.id: title(run) for run in runs}
        self.bars = Progress(
            TextColumn("{task.description:<40}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        # 0 under a budget, until the run has solved its steps.
        self.expected = {run.id: run.training.steps for run in runs}
        self.done: set[str] = set()
        self.all = self.bars.add_task("all steps", total=self._total(), note="")
        self.tasks: dict[str, Any] = {}
        self.steps: dict[str, int] = {}

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def notify(self, now: Step) -> None:
        """Move the bars to the progress of a run."""
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
        """Steps of all runs; a run with unknown steps counts as the mean of the others."""
        known = [steps for steps in self.expected.values() if steps]
        return sum(known) * len(self.expected) / len(known) if known else None
