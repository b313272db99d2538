"""Many short trainings, shared by the processes that are there, in the seconds given.

The processes share a folder beside the table. A run belongs to whoever holds the lock of its file,
which ends with the process, and is done once a table names it. So a stop keeps what is finished,
and what broke off is made again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from graphed import backward_of
from torch import Tensor, nn

TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
SHARE = 0.8
"""Of the seconds: what training may take, as the processes slow each other down."""
BESIDE = 1.5
"""Seconds that a run takes beside its steps, about."""


class Stopped(Exception):
    """The seconds are over."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a row of the page has.

    Attributes:
        name: the recipe, or what is dense.
        pattern: N:M, or "" where nothing is pruned.
        taught: whether the dense network teaches it.
        rates: what its tuning tries; none where nothing is trained.
        rates_of: the setup whose rate it takes, where it has no tuning of its own.
    """

    name: str
    pattern: str = ""
    taught: bool = False
    rates: tuple[float, ...] = ()
    rates_of: Setup | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; the rate of a main run, and of one beyond an edge, is known by tables alone."""

    setup: Setup
    part: str
    seed: int
    rate: float | None = None

    @property
    def key(self) -> str:
        """Its name among all runs."""
        s = self.setup
        taught = "taught" if s.taught else "alone"
        return f"{s.name}, {s.pattern or 'dense'}, {taught}, {self.part}, {self.rate}, {self.seed}"


def searched(setup: Setup) -> list[Run]:
    """The runs of a setup's tuning: its rates, and one beyond an edge."""
    runs = [Run(setup, "tuning", TUNING_SEED, rate) for rate in setup.rates]
    return [*runs, Run(setup, "edge", TUNING_SEED)]


def best_rate(setup: Setup, table: pd.DataFrame, beyond: bool = False) -> float | None:
    """The rate of the best tuning figure, or with `beyond` the next one where it lies at an edge.

    None while a rate has not been tried; with `beyond` 0 where the best is no edge.
    """
    one = setup.rates_of or setup
    if table.empty:
        return None
    mine = table[(table["setup"] == one.name) & (table["pattern"] == one.pattern)]
    mine = mine[(mine["taught"] == one.taught) & (mine["part"] == "tuning")]
    found = dict(zip(mine["rate"], mine["figure"], strict=True))
    if not set(one.rates) <= set(found):
        return None
    first = max(one.rates, key=lambda rate: found[rate])
    next_one = {min(one.rates): first / 2, max(one.rates): first * 2}.get(first, 0.0)
    if beyond:
        return next_one
    if next_one and next_one not in found:
        return None
    return max(found, key=lambda rate: found[rate])


class Runs:
    """The table that the processes share, and who makes which run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.began, self.given = time.perf_counter(), given
        self.part, self.parts = (int(x) for x in given.part.split("/"))
        self.folder = given.to.with_suffix("")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mine: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds."""
        return self.given.seconds - (time.perf_counter() - self.began)

    def table(self) -> pd.DataFrame:
        """The rows of every process."""
        found = [pd.read_parquet(file) for file in sorted(self.folder.glob("*.parquet"))]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def note(self, run: Run, rate: float, **what: Any) -> None:
        """A finished run, in this process's table and in the one of all."""
        s = run.setup
        # A rate beyond an edge is one more rate, on the page and when the best is taken.
        part = "tuning" if run.part == "edge" else run.part
        about = {"key": run.key, "setup": s.name, "pattern": s.pattern, "taught": s.taught}
        about |= {"part": part, "seed": run.seed, "rate": rate}
        second = round(time.perf_counter() - self.began, 1)
        self.mine.append({**about, **what, "at_second": second, **_machine()})
        sys.stdout.write(f"{self.mine[-1]}\n")
        sys.stdout.flush()
        name = f"{os.getpid()}-{self.part}.parquet"
        _written(pd.DataFrame(self.mine), self.folder / name)
        _written(self.table(), self.given.to)

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process, and no other, has it."""
        with (self.folder / f"{name.replace('/', '-')}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def shared(
        self, runs: Sequence[Run], ready: Callable[[Run], bool]
    ) -> Iterator[tuple[Run, float]]:
        """Runs that nobody has made or makes, in their order, as soon as their rate is known."""
        while True:
            done, waits = _keys(self.table()), False
            for run in runs:
                if run.key in done:
                    continue
                with self.lock(run.key) as free:
                    table = self.table() if free else pd.DataFrame()
                    rate = self._rate(run, table)
                    if not free or run.key in _keys(table) or rate is None or not ready(run):
                        waits = True
                    elif run.part != "edge" or rate:
                        yield run, rate
                        waits = True
                        break
            if not waits:
                return
            if self.left() < 0:
                raise Stopped
            time.sleep(0.02)

    def _rate(self, run: Run, table: pd.DataFrame) -> float | None:
        """What a run is made at; None while that is open."""
        if run.rate is not None:
            return run.rate
        if not run.setup.rates and run.setup.rates_of is None:
            return 0.0
        return best_rate(run.setup, table, run.part == "edge")

    def agreed(self, measure: Callable[[], int]) -> int:
        """The steps of every run: as many as are given, or as the first process finds room for."""
        if self.given.steps:
            return self.given.steps
        file = self.folder / "steps"
        with self.lock("steps", wait=True):
            if not file.exists():
                file.write_text(str(measure()))
        return int(file.read_text())

    def room(self, seconds: float, runs: int) -> int:
        """The steps for which there is room where a step of all runs takes so many seconds."""
        steps = int((SHARE * self.left() * self.parts - BESIDE * runs) / seconds)
        sys.stdout.write(f"room for {steps} steps a run\n")
        return max(self.given.least, min(self.given.most, steps // 10 * 10))


class Steps:
    """Forward and backward of one network: replays of a CUDA graph for each shape, or eager.

    The first step of a shape runs as it is, so that libraries choose their kernels.
    """

    def __init__(
        self,
        loss: Callable[[Mapping[str, Tensor]], Tensor],
        params: Sequence[nn.Parameter],
        graphs: bool,
    ) -> None:
        self.loss, self.params, self.graphs = loss, params, graphs
        self.recorded: dict[Any, Callable[[Mapping[str, Tensor]], Tensor] | None] = {}

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The loss; gradients lie in the parameters."""
        shape = tuple(x.shape for x in inputs.values())
        if self.graphs and shape in self.recorded:
            try:
                replay = self.recorded[shape] or backward_of(self.loss, inputs, self.params)
            except RuntimeError as error:
                sys.stdout.write(f"no CUDA graph, eager steps: {error}\n")
                self.graphs = False
            else:
                self.recorded[shape] = replay
                return replay(inputs)
        self.recorded.setdefault(shape, None)
        for param in self.params:
            param.grad = None
        loss = self.loss(inputs)
        loss.backward()
        return loss.detach()


def options(about: str, steps: int, least: int) -> argparse.ArgumentParser:
    """The options that every such script has."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("to", type=Path, help="the table to write; a folder beside it is shared")
    parser.add_argument("--seconds", type=float, default=290, help="after these no run begins")
    parser.add_argument("--part", default="0/1", help="i/n: this is process i of n")
    parser.add_argument("--steps", type=int, help="of every run; else what there is room for")
    parser.add_argument("--least", type=int, default=least, help="steps without --steps")
    parser.add_argument("--most", type=int, default=steps, help="steps without --steps")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    return parser


def linear(steps: int, warmup: float) -> Callable[[int], float]:
    """Up over a share of the steps, then down to 0."""
    warm = max(1, round(warmup * steps))
    return lambda k: min((k + 1) / warm, (steps - k) / max(1, steps - warm))


def _keys(table: pd.DataFrame) -> set[str]:
    return set() if table.empty else set(table["key"])


def _machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "torch": torch.__version__}


def _written(frame: pd.DataFrame, path: Path) -> None:
    """Whole or not at all, as other processes read it."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    frame.to_parquet(aside, index=False)
    aside.replace(path)
