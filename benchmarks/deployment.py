"""A packed network beside what people deploy instead, in one run.

    python benchmarks/deployment.py minilm --tokens 16 --pattern 1:8

Networks by their configurations, with random weights (speed does not depend on their values), every
linear layer of the blocks pruned by magnitude. The rivals are those of `nmflow bench`; packed runs
once with the values as they are and once with 8-bit values and activations. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from nmflow.bench import networks, ways
from nmflow.bench.bench import pruned
from nmflow.bench.results import cpu_name, version_text
from nmflow.bench.rivals import RIVALS, race
from nmflow.packed import compress
from nmflow.packed.measure import time_ways

SIZES: dict[str, Callable[[], Any]] = {
    "minilm": lambda: transformers.BertModel(
        transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
        ),
        add_pooling_layer=False,
    ),
    "bert-base": lambda: networks.network("bert-base"),
    "vit-base": lambda: networks.network("vit-base"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=16, help="of a text")
    parser.add_argument("--pattern", default="1:8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each way")
    parser.add_argument("--rivals", default="int8,bfloat16,onnxruntime", help=", ".join(RIVALS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = pruned(SIZES[args.network]().eval(), args.pattern, ("ff", "attn"))
    example = networks.example(model, 1, args.tokens)
    met = max(ways.tokens_of(model, example).values())
    names = args.rivals.split(",")
    with ways.scratch() as folder:
        runs: dict[str, Callable[[], object]] = {}
        best = ways.best_dense(model, example)
        runs["dense, best (torch)"] = lambda: best(**example)
        packed = compress(model, tokens=(met,), measure=False)
        runs["packed (torch)"] = lambda: packed(**example)
        eight = compress(model, tokens=(met,), measure=False, values="int8", activations="int8")
        runs["packed int8 (torch)"] = lambda: eight(**example)
        rivals, skipped = race(names, model, packed, example, Path(folder))
        if "onnxruntime" in names and "onnxruntime" not in skipped:
            (Path(folder) / "int8").mkdir()
            more, _ = race(["onnxruntime"], model, eight, example, Path(folder) / "int8")
            rivals["onnxruntime packed int8"] = more["onnxruntime packed"]
        runs |= rivals
        with torch.inference_mode():
            took = time_ways(runs, args.seconds, least=15)
    fastest = min(took[way].median for way in took if "packed" not in way)
    print(f"`python benchmarks/deployment.py {' '.join(sys.argv[1:])}`")
    print(f"{cpu_name()}; threads: {args.threads}; {version_text()}; {met} tokens a layer\n")
    print("| way | median ms | 10 % | 90 % | × fastest way that is not packed |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, time in sorted(took.items(), key=lambda item: -item[1].median):
        ms = [f"{t / 1e3:.2f}" for t in (time.median, time.q10, time.q90)]
        print(f"| {way} | {' | '.join(ms)} | {fastest / time.median:.2f} |")
    for rival, why in skipped.items():
        print(f"\nNot measured, {rival}: {why}")


if __name__ == "__main__":
    main()
