"""Packed products on a GPU against cuBLAS: microseconds in CUDA graphs, weights past the L2.

    python benchmarks/gpu.py decode [--seconds 150] [--csv FILE] [--search]
    python benchmarks/gpu.py panels [--seconds 60]
    python benchmarks/gpu.py llama [--seconds 90]
    python benchmarks/gpu.py check

`decode` is products of up to 64 tokens, `panels` of many, `llama` tokens a second of a network
of the shape of Llama-2-7B with random weights and 1:8 in every linear layer. `--search` times every
plan of the first shape rather than the one that is taken, to judge `gpu_plan.cost`. `check` runs
a few small products once, for compute-sanitizer. Rows are written as they are found, and a run ends
with its seconds, so that nothing is lost.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.kernels import gpu, gpu_driver, gpu_panels, gpu_plan
from nmflow.kernels.layout import Shape, tiled_from_canonical
from nmflow.packed.measure import copies_past_cache, gpu_ways, time_on_gpu

DEVICE = "cuda"
LAYERS = [(11008, 4096), (28672, 8192), (4096, 4096), (4096, 11008), (3072, 768), (768, 3072)]
PATTERNS = ["1:8", "1:16", "1:4", "2:4", "1:32", "1:16@16", "1:8@16"]
TOKENS = [1, 16, 64, 4, 8, 32]
MANY = [
    ((11008, 4096), 4096, "1:16@64"), ((11008, 4096), 4096, "1:8@64"),
    ((11008, 4096), 4096, "1:16@128"), ((11008, 4096), 256, "1:16@64"),
    ((4096, 11008), 4096, "1:16@64"), ((3072, 768), 25216, "1:16@64"),
    ((768, 3072), 25216, "1:16@64"), ((11008, 4096), 4096, "1:16"), ((11008, 4096), 256, "1:8"),
]  # fmt: skip


def random_packed(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tiled values and codes of a random bf16 weight on the GPU."""
    values = torch.randn(shape.out, shape.entries, device=DEVICE).bfloat16() * 0.02
    groups = shape.entries // shape.n
    draw = torch.rand(shape.lists, groups, shape.m, device=DEVICE)
    index = draw.topk(shape.n, -1).indices.sort(-1).values.flatten(1).to(torch.uint8)
    return tiled_from_canonical(values, index, shape)


def error(y: Tensor, x: Tensor, buffers: tuple[Tensor, Tensor], shape: Shape) -> float:
    """The relative error of a product."""
    want = x.double() @ gpu.expand(*buffers, shape).double().t()
    return float((y.double() - want).norm() / want.norm())


def copies(buffers: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """As many copies as do not fit into the L2."""
    count = copies_past_cache(sum(b.nbytes for b in buffers), buffers[0].device)
    return [(buffers[0].clone(), buffers[1].clone()) for _ in range(count)]


def decode(search: bool) -> Iterator[dict[str, Any]]:
    """Few tokens; the rows that decide come first."""
    for tokens in TOKENS:
        for out, inputs in LAYERS[:1] if search else LAYERS:
            gc.collect()
            torch.cuda.empty_cache()
            x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
            some = torch.randn(out, inputs, device=DEVICE).bfloat16() * 0.02
            dense = time_on_gpu(gpu_ways(some, None, x))
            xt = x.t().contiguous()
            pair = [partial(torch.matmul, w, xt) for w in (some, some.clone())]
            other = time_on_gpu({"w @ xt": pair * 2})
            best = min(t.median for t in (*dense.values(), *other.values()))
            for spec in PATTERNS:
                shape = Shape.of(out, inputs, spec)
                buffers = random_packed(shape)
                many = copies(buffers)
                card = gpu_driver.driver(0).card
                taken = gpu_plan.plan(shape, False, tokens, card)
                tried = list(gpu_plan.plans(shape, False, tokens, card)) if search else [taken]
                for plan in tried:
                    gpu._planned = lambda *args, plan=plan: plan  # pyright: ignore
                    y = gpu.matmul(x, *buffers, None, shape)
                    off = error(y, x, buffers, shape)
                    calls = [partial(gpu.matmul, x, *b, None, shape) for b in many]
                    took = time_on_gpu({"packed": calls}, 8 if search else 20)["packed"]
                    size = sum(b.nbytes for b in buffers)
                    yield {
                        "what": "decode", "out": out, "inputs": inputs, "tokens": tokens,
                        "pattern": spec, "dense_us": best, "packed_us": took.median,
                        "ratio": best / took.median, "tb_per_s": size / took.median / 1e6,
                        "error": off, "taken": plan == taken,
                        "cost": plan and gpu_plan.cost(plan, shape, tokens, card),
                        "plan": plan and {**dict(plan.kernel.constants), "grid": plan.grid},
                    }  # fmt: skip


def panels() -> Iterator[dict[str, Any]]:
    """Many tokens."""
    for (out, inputs), tokens, spec in MANY:
        gc.collect()
        torch.cuda.empty_cache()
        shape = Shape.of(out, inputs, spec)
        x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
        buffers = random_packed(shape)
        w = gpu.expand(*buffers, shape)
        xt = x.t().contiguous()
        ways = {"x @ wt": partial(F.linear, x, w), "w @ xt": partial(torch.matmul, w, xt)}
        dense = time_on_gpu({name: [way] * 4 for name, way in ways.items()})
        best = min(t.median for t in dense.values())
        cuts: list[gpu_panels.Block | None] = [None]
        if gpu_panels.serves(shape):
            cuts += [
                gpu_panels.Block(rows, entries, step, warps, stages)
                for rows in (64, 128) if shape.panel % rows == 0
                for entries in (32, 64) for step in (128, 256)
                for warps in (4, 8) for stages in (3, 4)
            ]  # fmt: skip
        for cut in cuts:
            try:
                if cut is None:
                    call = partial(gpu.matmul, x, *buffers, None, shape)
                else:
                    call = partial(gpu_panels.matmul, x, *buffers, None, shape, cut=cut)
                off = error(call(), x, buffers, shape)
                took = time_on_gpu({"packed": [call] * 4}, 8)["packed"]
            except Exception as problem:  # noqa: BLE001 -- a cut that does not fit is a result
                yield {
                    "what": "panels",
                    "pattern": spec,
                    "plan": cut,
                    "failed": repr(problem)[:200],
                }
                continue
            yield {
                "what": "panels", "out": out, "inputs": inputs, "tokens": tokens, "pattern": spec,
                "dense_us": best, "packed_us": took.median, "ratio": best / took.median,
                "error": off, "taken": cut is None, "plan": cut,
            }  # fmt: skip


def llama() -> Iterator[dict[str, Any]]:
    """Tokens a second of one sequence, in CUDA graphs, with a static cache."""
    import transformers

    import nmflow
    from nmflow.packed.modules import PackedLinear

    config = transformers.LlamaConfig()  # 7B
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.ones(1, 16, dtype=torch.long, device=DEVICE)
    for name in ("dense", "1:8"):
        if name != "dense":
            for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
                if layer.out_features != config.vocab_size:
                    layer.weight.data *= nmflow.mask(layer.weight, name)
            model = nmflow.compress(model, name, exclude="lm_head", measure=False, inplace=True)
            assert any(isinstance(m, PackedLinear) for m in model.modules())
        options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
        model.forward = torch.compile(type(model).forward.__get__(model), mode="reduce-overhead")
        took = []
        for new in (8, 8, 128):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        del model.forward
        torch.compiler.reset()
        yield {"what": "llama-7b", "pattern": name, "tokens_per_s": 120 / (took[2] - took[1])}


def check() -> Iterator[dict[str, Any]]:
    """Small products of every kind, once."""
    cases = [("1:16", 3), ("2:4", 9), ("1:8", 1), ("1:32", 2), ("3:8", 1), ("1:16@16", 20)]
    for spec, tokens in [*cases, ("1:16", 64), ("3:16", 70)]:
        shape = Shape.of(100, 1056 if "32" in spec else 1040, spec)
        buffers = random_packed(shape)
        x = torch.randn(tokens, shape.inputs, device=DEVICE).bfloat16()
        y = gpu.matmul(x, *buffers, None, shape, 1)
        torch.cuda.synchronize()
        yield {
            "what": "check",
            "pattern": spec,
            "tokens": tokens,
            "finite": bool(y.isfinite().all()),
        }


FIELDS = [
    "what", "out", "inputs", "tokens", "pattern", "dense_us", "packed_us", "ratio", "tb_per_s",
    "tokens_per_s", "error", "finite", "taken", "cost", "plan", "failed", "device", "torch",
]  # fmt: skip


def main() -> None:
    """Run one part, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["decode", "panels", "llama", "check"])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--search", action="store_true")
    args = parser.parse_args()
    parts = {
        "decode": lambda: decode(args.search),
        "panels": panels,
        "llama": llama,
        "check": check,
    }
    end = time.monotonic() + args.seconds
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    file = args.csv.open("a", newline="") if args.csv else None
    writer = csv.DictWriter(file, FIELDS) if file else None
    if writer and file and not file.tell():
        writer.writeheader()
    for row in parts[args.part]():
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(*(f"{k}={v}" for k, v in short.items()), flush=True)
        if writer and file:
            writer.writerow({**short, **where})
            file.flush()
        if time.monotonic() > end:
            print(f"stopped after {args.seconds} seconds", flush=True)
            break


if __name__ == "__main__":
    with torch.no_grad():
        main()
