"""Whole training steps of ViT-Base and BERT-base in the sparse phase, on kept places and dense.

    python benchmarks/sparse_steps.py [--networks vit-base bert-base] [--patterns 1:8 1:16 1:16@16]
        [--ways …] [--threads 1] [--rounds 5] [--csv FILE]
    python benchmarks/sparse_steps.py --products 1576 [--patterns …] [--csv FILE]

The networks are those of transformers by their configurations, with random weights, 12 layers and a
head of classes: ViT-Base on 8 images (1,576 tokens), BERT-base on 12 texts of 128 (1,536 tokens).
The six projections of every layer (feed-forward and attention) are targets, and the mask is frozen.
A step is zero_grad, forward, backward and `AdamW(fused=True).step`. The ways take turns, step by
step, in one process, and each figure is the median of the ratios to the step of the first way
(dense float32) in the same round. `held` is a frozen mask with dense products, as without
`sparse_steps`.

`--products TOKENS` times the three products of ViT-Base's feed-forward layers alone, and packing,
in milliseconds, the best of the rounds, beside torch's dense ones.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import nmflow
from _timing import facts, write_csv
from nmflow.kernels import cpu_steps
from nmflow.kernels.layout import Shape
from nmflow.masks.kept_values import to_bits

WAYS = (
    *("dense", "dense, bfloat16 autocast", "held"),
    *("kept places", "kept places, bfloat16 autocast"),
)


def vit_base() -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """ViT-Base, and its batches."""
    from transformers import ViTConfig, ViTForImageClassification

    def batch() -> dict[str, Any]:
        return {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(0, 2, (8,))}

    return ViTForImageClassification(ViTConfig()), batch


def bert_base() -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """BERT-base, and its batches."""
    from transformers import BertConfig, BertForSequenceClassification

    def batch() -> dict[str, Any]:
        ids, labels = torch.randint(0, 30522, (12, 128)), torch.randint(0, 2, (12,))
        return {"input_ids": ids, "labels": labels}

    return BertForSequenceClassification(BertConfig()), batch


NETWORKS = {"vit-base": vit_base, "bert-base": bert_base}


class Way:
    """One way to train the network, stepped on demand."""

    def __init__(self, name: str, network: str, pattern: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model, self.batch = NETWORKS[network]()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        if not name.startswith("dense"):
            self.flow = nmflow.attach(
                self.model,
                self.optimizer,
                nmflow.OneShot(dense=0),
                pattern,
                ["ff", "attn"],
                total_steps=1_000_000,
                sparse_steps="on" if name.startswith("kept places") else "off",
            )

    def step(self, batch: dict[str, Any]) -> dict[str, float]:
        """Seconds of one training step, and of its parts."""
        clock = time.perf_counter
        began = clock()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in self.name):
            loss = self.model(**batch).loss
        forward = clock()
        loss.backward()
        backward = clock()
        self.optimizer.step()
        end = clock()
        return {
            "step": end - began,
            "forward": forward - began,
            "backward": backward - forward,
            "optimizer": end - backward,
        }


def measure(network: str, pattern: str, names: list[str], rounds: int) -> list[dict[str, object]]:
    """A row for each way, in turns."""
    ways = [Way(name, network, pattern) for name in names]
    torch.manual_seed(1)
    batch = ways[0].batch()
    seconds: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            found = way.step(batch)
            if turn:  # the first builds the optimizer's state
                seconds[way.name].append(found)
    dense = [one["step"] for one in seconds[names[0]]]
    rows = []
    for name, found in seconds.items():
        own = [one["step"] for one in found]
        speeds = sorted(d / s for s, d in zip(own, dense, strict=True))
        parts = {
            f"{key}_s": round(statistics.median(one[key] for one in found), 3) for key in found[0]
        }
        rows.append(
            {
                "network": network,
                "pattern": pattern,
                "way": name,
                "times_dense": round(statistics.median(speeds), 3),
                "least": round(speeds[0], 3),
                "most": round(speeds[-1], 3),
                **parts,
            }
        )
    return rows


def products(tokens: int, patterns: list[str], rounds: int) -> list[dict[str, object]]:
    """A row for each layer and pattern, of one layer's products."""
    rows = []
    for out, inputs in ((3072, 768), (768, 3072)):
        x, dy, w = torch.randn(tokens, inputs), torch.randn(tokens, out), torch.randn(out, inputs)
        dense = {
            "forward": _best(rounds, F.linear, x, w),
            "input_grad": _best(rounds, torch.matmul, dy, w),
            "weight_grad": _best(rounds, torch.matmul, dy.t(), x),
        }
        for pattern in patterns:
            kept, shape = nmflow.mask(w, pattern), Shape.of(out, inputs, pattern)
            given = w * kept, to_bits(kept), shape
            values, codes, _ = cpu_steps.pack(*given)
            found = {
                "forward": _best(rounds, cpu_steps.forward, x, values, codes, None, shape),
                "input_grad": _best(rounds, cpu_steps.input_grad, dy, values, codes, shape),
                "weight_grad": _best(
                    rounds, cpu_steps.weight_grad, x, dy, values, codes, shape, True
                ),
            }
            pack = _best(rounds, cpu_steps.pack, *given)
            whole = sum(dense.values()) / (sum(found.values()) + pack)
            rows.append(
                {
                    **{"out": out, "in": inputs, "tokens": tokens, "pattern": pattern},
                    **{f"dense_{key}_ms": round(ms, 2) for key, ms in dense.items()},
                    **{f"{key}_ms": round(ms, 2) for key, ms in found.items()},
                    **{"pack_ms": round(pack, 2), "times_dense": round(whole, 1)},
                }
            )
    return rows


def _best(rounds: int, call: Callable[..., object], *given: object) -> float:
    """Milliseconds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call(*given)
        found.append(time.perf_counter() - began)
    return min(found) * 1e3


def main() -> None:
    """Print the ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--patterns", nargs="+", default=["1:8", "1:16", "1:16@16"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--products", type=int, metavar="TOKENS", help="of one layer alone")
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = facts()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[dict[str, object]] = []
    if args.products:
        rows = products(args.products, args.patterns, args.rounds)
        for one in rows:
            print(" ".join(f"{key}={value}" for key, value in one.items()), flush=True)
    for network in [] if args.products else args.networks:
        for pattern in args.patterns:
            gc.collect()
            found = measure(network, pattern, args.ways, args.rounds)
            rows += found
            for one in found:
                print(" ".join(f"{key}={value}" for key, value in one.items()), flush=True)
    if args.csv:
        write_csv(args.csv, [{**one, **where} for one in rows])


if __name__ == "__main__":
    main()
