"""Everything that the goals ask of AMX, on a machine that has it.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/amx.py [--csv FILE] [--parts layers vit steps]

layers: panels of 16, 32 and 64 rows in bfloat16, through their op with x and y by tokens (which
  lays both anew), and with both by features, times the best dense way; see `kernels.py`.
vit: ViT-Base on one image of 197 tokens, dense in bfloat16 and packed.
steps: the three products of a training step in bfloat16, dense and of panels, 1,576 tokens. Whole
  steps: `sparse_steps.py --ways "dense, bfloat16 autocast" "kept places, bfloat16 autocast"`.

`--rehearse` runs all of it in small on tiles in C++: its figures say nothing, but that it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nmflow
from _timing import copies_of, facts, interleaved, rotate, write_csv
from kernels import dense_calls, pack, sparse
from nmflow import native
from nmflow.kernels import cpu, cpu_steps, ops
from nmflow.kernels.layout import Shape
from nmflow.pattern import Pattern

PANELS = (16, 32, 64)
PATTERNS = ("1:8", "1:16")
# What prototypes reached, by shape and tokens: panels of 16 rows by features, 1:8 and 1:16.
GOALS: dict[tuple[int, int, int], tuple[float, float]] = {
    (768, 3072, 197): (4.0, 7.2),
    (768, 3072, 1024): (4.4, 7.5),
    (3072, 768, 1024): (3.2, 4.0),
}
Call = Callable[[], object]


def by_features(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, a feature's side by side."""
    return x.t().contiguous().t()


def packed_calls(x: torch.Tensor, out: int, pattern: Pattern) -> dict[str, Call]:
    """One packed weight by tokens, through its op, and by features, through its kernel."""
    values, codes, shape = pack(sparse(out, x.shape[1], pattern, x.dtype), pattern)
    count = copies_of(values.nbytes + codes.nbytes, "rotate", len(x))
    weights = [(values.clone(), codes.clone()) for _ in range(count)]
    numbers = (out, x.shape[1], pattern.n, pattern.m, pattern.panel)
    turned, y = by_features(x), by_features(x.new_empty(len(x), out))
    tokens: list[Call] = [lambda a=a, b=b: ops.matmul(x, a, b, None, numbers) for a, b in weights]
    features: list[Call] = []
    for a, b in weights:
        run = cpu.bind(a, b, shape).turned  # type: ignore[attr-defined]
        features.append(lambda run=run, held=(a, b): run(turned, None, y, len(turned), 0))
    return {f"{pattern} by tokens": rotate(tokens), f"{pattern} by features": rotate(features)}


def layers(shapes: list[tuple[int, int]], tokens: list[int], seconds: float) -> list[dict]:
    """Rows of single layers."""
    rows = []
    for out, inputs in shapes:
        for count in tokens:
            x = torch.randn(count, inputs).bfloat16()
            calls = dense_calls(x, torch.randn(out, inputs).bfloat16(), "rotate")
            dense = list(calls)
            for spec in PATTERNS:
                for panel in PANELS:
                    calls |= packed_calls(x, out, Pattern(f"{spec}@{panel}"))
            times = interleaved(calls, seconds)
            best = min(dense, key=lambda name: times[name].median)
            known = GOALS.get((out, inputs, count), ())
            goals: dict[str, float] = dict(zip(PATTERNS, known, strict=bool(known)))
            for name, found in times.items():
                goal = goals.get(name.split("@")[0]) if "@16 by features" in name else None
                rows.append(
                    {
                        **{"part": "layers", "what": f"({out}, {inputs})", "tokens": count},
                        **{"way": name, "ms": round(found.median * 1e3, 4)},
                        "times_dense": round(times[best].median / found.median, 2),
                        **{"dense": best, "goal": goal or ""},
                    }
                )
    return rows


def vit(seconds: float, small: bool) -> list[dict]:
    """Rows of ViT-Base in bfloat16, one image."""
    from transformers import ViTConfig, ViTForImageClassification

    size: dict[str, Any] = (
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} if small else {}
    )
    image = torch.randn(1, 3, 224, 224).bfloat16()

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers: dict[str, Any] = {"num_hidden_layers": 2} if small else {}
        return ViTForImageClassification(ViTConfig(**size, **layers)).bfloat16().eval()

    dense = network()
    calls: dict[str, Call] = {"dense": lambda: dense(image)}
    for spec in ("1:8@16", "1:16@16", "1:16@64"):
        model = network()
        nmflow.prune(model, spec, include=["ff", "attn"])
        packed = nmflow.compress(model, include=["ff", "attn"], tokens=(197,))
        calls[spec] = lambda packed=packed: packed(image)
    times = interleaved(calls, seconds)
    return [
        {
            **{"part": "vit", "what": "ViT-Base", "tokens": 197, "way": name},
            **{"ms": round(found.median * 1e3, 2)},
            "times_dense": round(times["dense"].median / found.median, 2),
            **{"dense": "bfloat16", "goal": 50 if name == "1:16@16" else ""},
        }
        for name, found in times.items()
    ]


def steps(shapes: list[tuple[int, int]], tokens: int, seconds: float) -> list[dict]:
    """Rows of the products of training steps."""
    rows = []
    for out, inputs in shapes:
        x, dy = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, out).bfloat16()
        w = torch.randn(out, inputs).bfloat16()
        calls: dict[str, Call] = {
            "forward": lambda x=x, w=w: torch.nn.functional.linear(x, w),
            "gradient of x": lambda dy=dy, w=w: dy @ w,
            "gradient of W": lambda x=x, dy=dy: dy.t() @ x,
        }
        dense = list(calls)
        for spec in ("1:8@16", "1:16@16", "1:16@64"):
            shape = Shape.of(out, inputs, spec)
            values, codes, _ = cpu_steps.pack(w.float() * nmflow.mask(w, spec), None, shape)
            held = cpu_steps.halved(values, shape), codes, shape
            calls |= {
                f"forward {spec}": lambda x=x, h=held: cpu_steps.forward(x, *h[:2], None, h[2]),
                f"gradient of x {spec}": lambda dy=dy, h=held: cpu_steps.input_grad(dy, *h),
                f"gradient of W {spec}": lambda x=x, dy=dy, h=held: cpu_steps.weight_grad(
                    x, dy, *h, True
                ),
            }
        times = interleaved(calls, seconds)
        for name, found in times.items():
            best = next(times[one] for one in dense if name.startswith(one))
            rows.append(
                {
                    **{"part": "steps", "what": f"({out}, {inputs})", "tokens": tokens},
                    **{"way": name, "ms": round(found.median * 1e3, 4)},
                    "times_dense": round(best.median / found.median, 2),
                    **{"dense": "torch", "goal": ""},
                }
            )
    return rows


def main() -> None:
    """Measure, print, write; or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["layers", "vit", "steps"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--csv")
    args = parser.parse_args()
    if args.rehearse and native.available() and native.emulate_tiles(True):
        native.set_isa("amx")
    if not native.available() or native.isa() != "amx":
        has = ", ".join(native.features()) if native.available() else native.why_not()
        sys.exit(f"benchmarks/amx.py needs a processor with AMX and its kernels; here: {has}")
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    with torch.inference_mode():
        shapes = [(64, 96)] if args.rehearse else [(3072, 768), (768, 3072)]
        if "layers" in args.parts:
            rows += layers(shapes, [40] if args.rehearse else [197, 1024], args.seconds)
        if "vit" in args.parts:
            rows += vit(args.seconds, args.rehearse)
        if "steps" in args.parts:
            rows += steps(shapes, 40 if args.rehearse else 1576, args.seconds)
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    print(", ".join(f"{key}: {value}" for key, value in facts().items()))
    if args.csv:
        write_csv(args.csv, [{**row, **facts()} for row in rows])


if __name__ == "__main__":
    main()
