"""What a recipe adds to one training step, beside the dense step and the in-forward way.

    python benchmarks/overhead.py [--tokens 1600 256 128] [--threads 1] [--rounds 15] [--csv FILE]
    python benchmarks/overhead.py --held --fused [--rounds 41] [--csv FILE]
    python benchmarks/overhead.py --device cuda --layers 12 --tokens 25216 3152 --amp --fused
    python benchmarks/overhead.py --device cuda --layers 12 --tokens 3152 --amp --fused --graphed

The network is the feed-forward pair of ViT-Base (768 → 3072 → 768), every weight of which is a
target: the hardest case, since nothing else dilutes the cost. A step is zero_grad, forward,
backward and `AdamW.step`. The ways take turns, step by step, in one process, and each figure is the
median of the ratios to the dense step of the same round, so that a drift of the machine cancels.
On a GPU a step lasts until the device is done with it.

`--held` takes `optimizer.step()` alone instead of the whole step, with masks that are taken anew
and with masks that are held.

`--graphed` has whole steps in CUDA graphs: `Flow.graphed` beside the dense step captured by torch.

`in-forward` is how the released code of arXiv 2402.04744 does it: an argsort, a mask and a product
in every forward pass.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmflow
from _timing import facts, write_csv
from nmflow.flow.graphs import CudaRecorder

GOALS = {1600: 1.01, 256: 1.05, 128: 1.08}  # in plain torch, without the library: 1.05 at 1600
RECIPES = {
    "mdgf-exponential": nmflow.MDGF("exponential", finetune=0.0),
    "mdgf, straight-through": nmflow.MDGF(gradient="straight-through", finetune=0.0),
    "sr-ste": nmflow.SRSTE(),
    "settling": nmflow.Settling(dense=0.0, finetune=0.0),
}


LONG = 1_000_000
HELD = {
    "ste": (nmflow.STE(), {}),
    "ste, held": (nmflow.STE(), {"mask_interval": LONG}),
    "sr-ste": (nmflow.SRSTE(), {}),
    "sr-ste, held": (nmflow.SRSTE(), {"mask_interval": LONG}),
    "settling": (nmflow.Settling(dense=0.0, finetune=LONG - 1), {}),
    "settling, held": (nmflow.Settling(dense=0.0, finetune=LONG - 1), {"freeze_mask": True}),
    "mdgf, masked": (nmflow.MDGF(finetune=LONG - 1), {}),
    "mdgf, masked, held": (nmflow.MDGF(finetune=LONG - 1), {"freeze_mask": True}),
    "one-shot (held)": (nmflow.OneShot(dense=0), {}),
    "one-shot, kept values": (nmflow.OneShot(dense=0), {"sparse_steps": "on"}),
    "settling, kept values": (
        nmflow.Settling(dense=0.0, finetune=LONG - 1),
        {"freeze_mask": True, "sparse_steps": "on"},
    ),
}


class InForward(nn.Linear):
    """A linear layer that masks itself by argsort in every forward pass."""

    n, m, delta = 1, 16, 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Mask, multiply, and only then compute."""
        groups = self.weight.detach().abs().reshape(-1, self.m)
        drop = groups.argsort(dim=1)[:, : self.m - self.n]
        mask = torch.ones_like(groups).scatter_(1, drop, self.delta).reshape(self.weight.shape)
        # The straight-through gradient, as a detached difference.
        weight = self.weight + (self.weight * mask - self.weight).detach()
        return F.linear(x, weight, self.bias)


def network(linear: type[nn.Linear], layers: int = 1) -> nn.Sequential:
    """Feed-forward pairs of ViT-Base."""
    torch.manual_seed(0)
    pairs = ((linear(768, 3072), nn.GELU(), linear(3072, 768)) for _ in range(layers))
    return nn.Sequential(*(module for pair in pairs for module in pair))


class Way:
    """One way to train the network, stepped on demand."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.amp = name, args.amp
        model = network(InForward if name == "in-forward" else nn.Linear, args.layers)
        self.model = model.to(args.device)
        own: dict[str, Any] = {"lr": 1e-4, "fused": args.fused}
        if args.graphed:
            own |= {"lr": torch.tensor(1e-4, device=args.device), "capturable": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **own)
        recipe, self.flow = RECIPES.get(name), None
        if recipe is not None:
            self.flow = nmflow.attach(
                self.model, self.optimizer, recipe, args.pattern, include="*", total_steps=1_000_000
            )
        self.replay: Callable[[], object] | None = None

    def graph(self, x: Tensor) -> None:
        """Have the step be in a CUDA graph from now on."""

        def one() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
                loss = self.model(x).square().mean()
            loss.backward()
            self.optimizer.step()

        if self.flow is not None:
            step = self.flow.graphed(one)
            for _ in range(5):
                step()
            assert not step.why, step.why
            self.replay = step
            return
        recorder = CudaRecorder(x.device)
        for _ in range(3):
            recorder.warm(one)
        self.replay, _ = recorder.capture(one)

    def step(self, x: Tensor) -> float:
        """Seconds of one training step."""
        begin = time.perf_counter()
        if self.replay is not None:
            self.replay()
            torch.cuda.synchronize()
            return time.perf_counter() - begin
        self.optimizer.zero_grad(set_to_none=False)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def measure(tokens: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each way, in turns."""
    InForward.n, InForward.m = map(int, args.pattern.split(":"))
    names = ("dense", *RECIPES) if args.graphed else ("dense", *RECIPES, "in-forward")
    ways = [Way(name, args) for name in names]
    x = torch.randn(tokens, 768, device=args.device)
    for way in ways if args.graphed else ():
        way.graph(x)
    for _ in range(2):
        for way in ways:
            way.step(x)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            seconds[way.name].append(way.step(x))
    return [row(tokens, way.name, seconds[way.name], seconds["dense"]) for way in ways]


def measure_held(args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each way of `HELD`: `optimizer.step()` alone, in turns with the plain one."""
    optimizers = {}
    for name in ("plain", *HELD):
        model = network(nn.Linear, args.layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=args.fused)
        if name in HELD:
            recipe, options = HELD[name]
            nmflow.attach(model, optimizer, recipe, args.pattern, "*", total_steps=LONG, **options)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for _ in range(3):
            optimizer.step()
        optimizers[name] = optimizer
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - begin)
    return [row("", name, seconds[name], seconds["plain"]) for name in optimizers]


def row(tokens: object, name: str, own: list[float], base: list[float]) -> dict[str, object]:
    """Medians and quartiles of a way beside those that it took turns with."""
    ratios = sorted(s / d for s, d in zip(own, base, strict=True))
    return {
        "tokens": tokens,
        "way": name,
        "ms": statistics.median(own) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_q25": ratios[len(ratios) // 4],
        "ratio_q75": ratios[3 * len(ratios) // 4],
    }


def memory(args: argparse.Namespace) -> str:
    """Bytes that live between steps beside the dense run's, per targeted byte."""
    x = torch.randn(8, 768, device=args.device)
    way, dense = Way("mdgf-exponential", args), Way("dense", args)
    way.step(x)
    dense.step(x)
    gc.collect()

    def held(optimizer: torch.optim.Optimizer) -> int:
        tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)

    targeted = sum(p.numel() * 4 for p in way.model.parameters() if p.ndim == 2)
    extra = held(way.optimizer) - held(dense.optimizer)
    return f"held between steps beside the dense run's: {extra / targeted:.3f} × the targeted bytes"


def main() -> None:
    """Print the ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1600, 256, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--held", action="store_true", help="optimizer.step() alone, masks held")
    parser.add_argument("--fused", action="store_true", help="AdamW(fused=True)")
    parser.add_argument("--graphed", action="store_true", help="whole steps in CUDA graphs")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=1, help="feed-forward pairs")
    parser.add_argument("--pattern", default="1:16")
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = facts() | {"adamw": "fused" if args.fused else "default"}
    where |= {
        "pattern": args.pattern,
        "layers": args.layers,
        "amp": args.amp,
        "graphed": args.graphed,
    }
    where["device"] = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = []
    for tokens in () if args.held else args.tokens:
        rows += measure(tokens, args)
    if args.held:
        rows += measure_held(args)
    print(f"{'tokens':>7} {'way':<18} {'ms':>8} {'× dense':>8} {'quartiles':>14}  goal")
    for one in rows:
        goal = ""
        if one["way"] in RECIPES and args.device == "cpu":
            goal = f"≤ {GOALS.get(one['tokens'], '-')}"
        print(
            f"{one['tokens']:>7} {one['way']:<18} {one['ms']:>8.2f} {one['ratio']:>8.3f} "
            f"{one['ratio_q25']:>6.3f}–{one['ratio_q75']:<6.3f}  {goal}"
        )
    print(memory(args))
    print(
        f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB"
    )
    if args.csv:
        write_csv(args.csv, [{**one, **where} for one in rows])


if __name__ == "__main__":
    main()
