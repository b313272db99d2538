"""SmolLM2-135M at N:M in FF: held-out perplexity over tokens of training, in the seconds given.

    python study/smollm_train.py WEIGHTS.gguf smollm-tokens.npz smollm.parquet --seconds 80

The runs come in the order of the protocol: learning rates on the tuning documents, then main runs.
The table is written anew after every run, so a stop keeps what is finished. The tokens are those of
`study/smollm_text.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graphed
import numpy as np
import pandas as pd
import torch
from smollm_network import Network, loaded, own_loss, taught_loss
from torch import Tensor, nn

import nmflow
from nmflow.distill import hidden_loss
from nmflow.recipes import Recipe

LENGTH, ROWS, BETAS, WARMUP, CLIP = 512, 16, (0.9, 0.95), 0.05, 1.0
RATES = (5e-4, 1e-3, 2e-3)
DENSE_RATE = 2e-4
MARKS = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
"""The shares of a run after which it is evaluated."""
RECIPES: dict[str, Recipe] = {
    "Settling": nmflow.Settling(),
    "SR-STE": nmflow.SRSTE(lam=2e-3),
    "MDGF-Exponential": nmflow.MDGF("exponential"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: what the table says of it, beside what came out."""

    setup: str
    pattern: str
    taught: bool
    rate: float
    part: str
    tokens: int
    seed: int = 0


class Stopped(Exception):
    """The seconds are over."""


class Study:
    """The networks, the tokens and the clock that all runs share."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.began, self.seconds = time.perf_counter(), given.seconds
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.graphs = self.device == "cuda" and not given.eager
        self.compiled, self.hidden, self.to = given.compile, given.hidden, given.to
        self.tokens = {name: rows_of(x) for name, x in np.load(given.tokens).items()}
        self.dense = loaded(given.weights).to(self.device)
        # The teacher's weights are rounded once, not in every step; the products are the same.
        self.teacher = Network(copy.deepcopy(self.dense).to(torch.bfloat16).requires_grad_(False))
        torch._dynamo.config.suppress_errors = True  # a compiler that is missing costs time alone
        self.taught_loss: Any = torch.compile(taught_loss) if self.compiled else taught_loss
        self.before = pd.read_parquet(given.known) if given.known else pd.DataFrame()
        self.known = searched(self.before)
        self.table: list[dict[str, Any]] = []
        self.cost: dict[bool, float] = {}

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.began)

    def autocast(self) -> torch.autocast:
        """bfloat16 products."""
        return torch.autocast(self.device, torch.bfloat16)

    @torch.no_grad()
    def perplexity(self, network: Network, part: str) -> float:
        """Of every second row's tokens after its first."""
        losses = []
        with self.autocast():
            for some in self.tokens[part][::2].split(ROWS):
                if len(some) == ROWS:
                    ids = some.to(self.device)
                    losses.append(own_loss(network(ids)[0], ids))
        return float(torch.stack(losses).mean().exp())

    def note(self, run: Run, step: int, seconds: float, perplexity: float, loss: float) -> None:
        """One row of the table."""
        tokens = step * ROWS * LENGTH
        self.table.append(
            {
                **dataclasses.asdict(run),
                "trained_tokens": tokens,
                "train_seconds": round(seconds, 3),
                "perplexity": round(perplexity, 4),
                "train_loss": round(loss, 4),
                "at_second": round(time.perf_counter() - self.began, 1),
            }
        )
        sys.stdout.write(f"{self.table[-1]}\n")
        sys.stdout.flush()

    def save(self) -> None:
        """The table, with what made it."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        about = {"device": name, "torch": torch.__version__, "compiled": self.compiled}
        made = pd.DataFrame(self.table).assign(**about)
        pd.concat([self.before, made], ignore_index=True).to_parquet(self.to, index=False)

    def train(self, run: Run, noted: bool = True) -> float:
        """Train and judge; returns the last perplexity. What is not noted warms the device up."""
        gc.collect()  # the network and the graph of the run before
        model = copy.deepcopy(self.dense)
        network = Network(model)
        steps = run.tokens // (ROWS * LENGTH)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            params, lr=run.rate, betas=BETAS, weight_decay=0.0, fused=self.device == "cuda"
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _linear(steps))
        recipe = RECIPES.get(run.setup)
        flow = recipe and nmflow.attach(
            model, optimizer, recipe, run.pattern, include="ff", total_steps=steps
        )
        marks = {max(1, round(mark * steps)) for mark in MARKS if run.part != "tuning" or mark == 1}
        seconds, since = 0.0, self.now()
        backward: Any = None
        for step, ids in enumerate(self.batches(run.seed, steps), 1):
            if step == 3 and self.graphs:  # until then libraries choose their kernels
                backward = self.recorded(network, ids, run.taught, params)
            if backward:
                loss = backward({"ids": ids})
            else:
                loss = self.loss(network, ids, run.taught)
                loss.backward()
                loss = loss.detach()  # its graph would break the capture
            nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0 and self.left() < 0:
                raise Stopped
            if step in marks:
                seconds += self.now() - since
                with flow.final_masks() if flow else contextlib.nullcontext():
                    found = self.perplexity(network, run.part)
                if noted:
                    self.note(run, step, seconds, found, loss.item())
                since = self.now()
        if flow:
            flow.finalize()
            if not nmflow.audit(model, run.pattern, include="ff").ok:
                raise AssertionError(f"{run}: not {run.pattern}")
        self.cost[run.taught] = seconds / steps
        self.save()
        return found

    def loss(self, network: Network, ids: Tensor, taught: bool) -> Tensor:
        """Of one batch."""
        with self.autocast():
            logits, states = network(ids)
            if not taught:
                return own_loss(logits, ids)
            with torch.no_grad():
                told, wanted = self.teacher(ids)
            loss = self.taught_loss(logits, told, ids)
            if self.hidden:
                # The first place holds a few huge numbers, beside which no other would count.
                cut = [[h[:, 1:] for h in some] for some in (states, wanted)]
                loss = loss + self.hidden * hidden_loss(*cut)
        return loss

    def recorded(self, network: Network, ids: Tensor, taught: bool, params: list[Any]) -> Any:
        """The loss of a batch and its gradients, as one graph."""
        return graphed.backward_of(
            lambda held: self.loss(network, held["ids"], taught), {"ids": ids}, params
        )

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        """Rows in an order of the seed: the same for every run of it."""
        rows = self.tokens["train"]
        made = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(rows), generator=made)
                           for _ in range(steps * ROWS // len(rows) + 1)])  # fmt: skip
        for i in range(steps):
            yield rows[order[i * ROWS : (i + 1) * ROWS]].to(self.device, non_blocking=True)

    def now(self) -> float:
        """The time, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def tuned(self, setup: str, pattern: str, taught: bool, tokens: int) -> float:
        """The best of three rates on the tuning documents; one more where it lies at an edge."""
        found: dict[float, float] = {}

        def tried(rate: float) -> float:
            run = Run(setup, pattern, taught, rate, "tuning", tokens)
            if run not in self.known:
                self.known[run] = self.train(run)
            return self.known[run]

        for rate in RATES:
            found[rate] = tried(rate)
        best = min(found, key=lambda rate: found[rate])
        beyond = {min(RATES): best / 2, max(RATES): best * 2}.get(best)
        if beyond:
            found[beyond] = tried(beyond)
        return min(found, key=lambda rate: found[rate])


def searched(table: pd.DataFrame) -> dict[Run, float]:
    """The perplexities of the tuning runs that a table has."""
    if table.empty:
        return {}
    rows: Any = table[(table["part"] == "tuning") & (table["tokens"] > 0)]
    names = [field.name for field in dataclasses.fields(Run)]
    keys = (Run(**row) for row in rows[names].to_dict("records"))
    return dict(zip(keys, rows["perplexity"], strict=True))


def rows_of(tokens: Any) -> Tensor:
    """Whole rows of a stream of tokens."""
    count = len(tokens) // LENGTH
    return torch.from_numpy(tokens[: count * LENGTH].astype(np.int64)).view(count, LENGTH)


def _linear(steps: int) -> Callable[[int], float]:
    warm = max(1, round(WARMUP * steps))
    return lambda k: min((k + 1) / warm, (steps - k) / max(1, steps - warm))


def work(study: Study, given: argparse.Namespace) -> None:
    """Every run, the most wanted first."""
    study.train(Run("Settling", "1:4", True, RATES[0], "tuning", 3 * ROWS * LENGTH), noted=False)
    for part in ("held_out", "tuning") if study.before.empty else ():
        found = study.perplexity(Network(study.dense), part)
        study.note(Run("Dense, as it is", "", False, 0.0, part, 0), 0, 0.0, found, 0.0)
    rate = {n: study.tuned(n, "1:4", True, given.tuning) for n in ("Settling", "SR-STE")}
    # What is left goes to these two and to the dense one, which has no teacher: 2.6 such runs.
    room = int(0.9 * study.left() / (2.6 * study.cost[True])) * ROWS * LENGTH
    if room < given.tuning and not given.main:
        raise Stopped
    tokens = given.main or min(given.budget, room)

    def judged(name: str, pattern: str, taught: bool, rate: float) -> None:
        study.train(Run(name, pattern, taught, rate, "held_out", tokens))

    for name in rate:
        judged(name, "1:4", True, rate[name])
    judged("Dense, trained on", "", False, DENSE_RATE)
    for name in rate:
        judged(name, "1:4", False, study.tuned(name, "1:4", False, given.tuning))
    for name in rate:
        judged(name, "1:8", True, rate[name])
    other = "MDGF-Exponential"
    judged(other, "1:4", True, study.tuned(other, "1:4", True, given.tuning))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("weights", type=Path, help="a GGUF file, or a folder of transformers")
    parser.add_argument("tokens", type=Path, help="what study/smollm_text.py wrote")
    parser.add_argument("to", type=Path, help="the table to write")
    parser.add_argument("--seconds", type=float, default=80, help="after these no step is made")
    parser.add_argument("--budget", type=int, default=8_000_000, help="most tokens of a main run")
    parser.add_argument("--main", type=int, help="tokens of a main run, instead of the room")
    parser.add_argument("--known", type=Path, help="an earlier table, whose search stands")
    parser.add_argument("--tuning", type=int, default=500_000, help="tokens of a tuning run")
    parser.add_argument("--hidden", type=float, default=1.0, help="weight of the hidden states")
    parser.add_argument("--compile", action="store_true", help="compile the loss with a teacher")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    given = parser.parse_args()
    study = Study(given)
    try:
        work(study, given)
    except Stopped:
        sys.stdout.write("the seconds are over\n")
    finally:
        study.save()


if __name__ == "__main__":
    main()
