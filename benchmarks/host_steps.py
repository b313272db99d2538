"""What a recipe's step costs the host, as on a GPU, but without one: no kernel of nmflow runs.

    python benchmarks/host_steps.py [--weights 24] [--rounds 400] [--csv FILE]

`optimizer.step()` of layers of 64 by 64 under `AdamW(fused=True)`, whose own work on so few weights
is next to nothing. The recipes take the way that they take on a GPU, but every launch of Triton is
a call that does nothing, so a launch itself, some 20 µs, is left out. The ways take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import types
from typing import Any

import torch
from torch import nn

import nmflow
from _timing import facts, write_csv
from nmflow.flow import edits, marks, plans, slots

LONG = 1_000_000
RECIPES: dict[str, tuple[nmflow.Recipe, dict[str, Any]]] = {
    "mdgf-exponential": (nmflow.MDGF("exponential", finetune=0.0), {}),
    "mdgf, straight-through": (nmflow.MDGF(gradient="straight-through", finetune=0.0), {}),
    "sr-ste": (nmflow.SRSTE(), {}),
    "settling": (nmflow.Settling(dense=0.0, finetune=0.0), {}),
    "one-shot (held)": (nmflow.OneShot(dense=0), {}),
    "settling, held": (nmflow.Settling(dense=0.0, finetune=LONG - 10), {"freeze_mask": True}),
}


class Nothing:
    """A kernel that does nothing; fingerprints are all 0."""

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, prints_ptr: torch.Tensor | None = None, **_: Any) -> None:
        if prints_ptr is not None:
            prints_ptr.zero_()


def as_on_a_gpu() -> None:
    """Have everything take the way that it takes on a GPU."""
    kernels = types.ModuleType("nmflow.masks.triton_kernel")
    for name in ("project_all", "hold_all", "fingerprints"):
        setattr(kernels, name, Nothing())
    sys.modules[kernels.__name__] = kernels
    nmflow.masks.triton_kernel = kernels  # type: ignore[attr-defined]

    def zeros(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), dtype=torch.int64)

    plans._waits = edits.waits = marks._together = lambda x: True  # pyright: ignore
    marks.fingerprint = edits.fingerprint = zeros
    slots.blank = lambda x: None  # type: ignore[assignment]


def made(name: str, weights: int) -> torch.optim.Optimizer:
    """An optimizer of so many layers that has stepped some times."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(weights)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if name in RECIPES:
        recipe, more = RECIPES[name]
        nmflow.attach(model, optimizer, recipe, "1:16", "*", total_steps=LONG, **more)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    for _ in range(15):
        optimizer.step()
    return optimizer


def main() -> None:
    """Print the ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    as_on_a_gpu()
    ways = {name: made(name, args.weights) for name in ("plain", *RECIPES)}
    gc.disable()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, optimizer in ways.items():
            begin = time.perf_counter()
            optimizer.step()
            took[name].append((time.perf_counter() - begin) * 1e6)
    rows = []
    for name, own in took.items():
        added = min(own) - min(took["plain"])
        rows.append({
            "way": name, "weights": args.weights, "best_us": min(own),
            "median_us": statistics.median(own), "added_us_a_weight": added / args.weights,
        })  # fmt: skip
        print(
            f"{name:<24} best {min(own):7.0f} µs, median {rows[-1]['median_us']:7.0f}; "
            f"added a weight {rows[-1]['added_us_a_weight']:5.1f}"
        )
    if args.csv:
        write_csv(args.csv, [{**row, **facts()} for row in rows])


if __name__ == "__main__":
    main()
