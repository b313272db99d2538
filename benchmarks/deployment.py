"""A packed network beside what people deploy instead, in one run.

    python benchmarks/deployment.py minilm-l6 --tokens 16 --patterns 1:8
    python benchmarks/deployment.py vit-base --include ff ff,attn --patterns 1:8 1:16 1:16@4

As `nmflow bench`, but all patterns take turns with the same rivals, and every layer is packed
without being timed. Networks by their configurations, with random weights (speed does not depend
on their values), pruned by magnitude. Packed runs once with the values as they are and once with
8-bit values and activations (`--values`), in torch and in onnxruntime. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nmflow.bench import networks, ways
from nmflow.bench.bench import pruned
from nmflow.bench.results import cpu_name, version_text
from nmflow.bench.rivals import RIVALS, race
from nmflow.packed import compress
from nmflow.packed.measure import time_ways

VALUES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"values": "int8", "activations": "int8"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", help=f"{', '.join(networks.KNOWN)}, or as for nmflow bench")
    parser.add_argument("--tokens", type=int, default=16, help="of a text")
    parser.add_argument("--patterns", nargs="+", default=["1:8"])
    parser.add_argument("--include", nargs="+", default=["ff,attn"])
    parser.add_argument("--values", nargs="+", default=["float32", "int8"], choices=VALUES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each way")
    parser.add_argument("--rivals", default="int8,bfloat16,onnxruntime", help=", ".join(RIVALS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = networks.network(args.network)
    example = networks.example(model, 1, args.tokens)
    met = max(ways.tokens_of(model, example).values())
    best = ways.best_dense(model, example)
    runs: dict[str, Callable[[], object]] = {"dense, best (torch)": lambda: best(**example)}
    packed = {}
    for include in args.include:
        for pattern in args.patterns:
            sparse = pruned(model, pattern, include.split(","))
            for values in args.values:
                name = f"packed {include} {pattern}, {values}"
                packed[name] = compress(sparse, tokens=(met,), measure=False, **VALUES[values])
                runs[f"{name} (torch)"] = lambda one=packed[name]: one(**example)
    with ways.scratch() as folder:
        rivals, skipped = race(args.rivals.split(","), model, packed, example, Path(folder))
        runs |= rivals
        with torch.inference_mode():
            took = time_ways(runs, args.seconds, least=9)
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
