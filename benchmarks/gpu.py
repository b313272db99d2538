"""Packed products on a GPU against cuBLAS: microseconds in CUDA graphs, weights past the L2.

    python benchmarks/gpu.py tables [--search] [--seconds 90] [--csv FILE] [--kernels FOLDER]
    python benchmarks/gpu.py decode ready panels llama roof steps int8 three train [--seconds 90] …
    python benchmarks/gpu.py check
    python benchmarks/gpu.py compile --kernels FOLDER [--search] [--workers 8] [--seconds 60]
    python benchmarks/gpu.py warm [--workers 4] [--seconds 60]

`decode` is products of up to 64 tokens, `ready` those of 16 and more by warp groups whose x is put
in order first, `panels` of many, `llama` tokens a second of a network of the shape of Llama-2-7B
with random weights and 1:8 in every linear layer, `steps` training steps that are bound by
launches, `roof` what memory gives to a copy. `int8` is products with 8-bit values, `three` the
products of a training step on panels, `train` whole steps of networks in their sparse phase.
`tables` is all of them in one process. With `--search` other plans than the one that is taken are
timed too, last, to judge `gpu_cuts.plan` and `gpu_panels.block`. `check` runs a few small products
once, for compute-sanitizer. `compile` compiles the kernels of `decode` on many cores and needs no
GPU, `warm` those in Triton of `panels`, `three` and `train`. Rows are written as they are found,
and a run ends with its seconds, so that nothing is lost.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nmflow.errors import CompressError
from nmflow.kernels import gpu, gpu_cuts, gpu_driver, gpu_panels, gpu_plan
from nmflow.kernels import int8 as stream_layout
from nmflow.kernels.gpu_plan import Card, Kernel, Plan
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.masks import mask
from nmflow.packed.measure import copies_past_cache, gpu_ways, time_on_gpu

DEVICE = "cuda"
Row = dict[str, Any]
# What decides comes first: (out, in), patterns, tokens.
DECODE = [
    ([(28672, 8192), (11008, 4096)], ["1:8", "1:16", "1:4", "2:4"], [1, 16, 64, 4]),
    ([(11008, 4096)], ["1:32", "1:16@16", "1:8@16"], [1, 16, 64]),
    ([(4096, 4096), (4096, 11008), (768, 3072)], ["1:8", "1:16"], [1, 16]),
    ([(32000, 4096)], ["1:8"], [1]),
    ([(28672, 8192), (11008, 4096)], ["1:8", "1:16"], [8, 32]),
]
MANY = [
    ((11008, 4096), 4096, "1:16@64"), ((11008, 4096), 4096, "1:8@64"),
    ((11008, 4096), 4096, "1:16@128"), ((11008, 4096), 256, "1:16@64"),
    ((4096, 11008), 4096, "1:16@64"), ((3072, 768), 25216, "1:16@64"),
    ((768, 3072), 25216, "1:16@64"), ((11008, 4096), 4096, "1:16"), ((11008, 4096), 256, "1:8"),
]  # fmt: skip
SEARCHED_PANELS = 7  # of MANY
LATER = 25.0  # seconds that a search leaves to the network
NEIGHBOURS = 3  # plans of a product that are those of its neighbours
# Warps, slices, row tiles, shares, stages.
LOOKUPS = [
    (8, 2, 1, 1, 4), (16, 2, 1, 1, 4), (8, 4, 1, 1, 4), (16, 4, 1, 1, 4), (4, 2, 1, 1, 4),
    (4, 4, 1, 1, 4), (8, 1, 1, 1, 4), (16, 8, 1, 1, 4), (16, 2, 1, 2, 4), (8, 2, 1, 2, 4),
    (16, 1, 1, 2, 4), (16, 1, 1, 4, 4), (16, 4, 1, 1, 2), (8, 2, 1, 1, 2),
]  # fmt: skip
GROUPS = [
    (16, 1, 1, 1, 3), (8, 1, 1, 1, 3), (16, 2, 1, 1, 3), (8, 2, 1, 1, 3), (8, 1, 1, 2, 3),
    (16, 1, 1, 2, 3), (16, 4, 1, 1, 3), (4, 1, 1, 1, 4), (16, 2, 1, 2, 3), (8, 2, 1, 2, 3),
    (16, 1, 1, 4, 3), (4, 1, 1, 2, 4), (16, 1, 1, 1, 2), (8, 1, 1, 4, 3),
]  # fmt: skip

READY = [
    (16, 1, 2, 1, 2), (16, 1, 1, 1, 3), (16, 1, 2, 1, 3), (16, 1, 1, 1, 4), (16, 1, 4, 1, 2),
    (16, 1, 2, 2, 2), (16, 1, 1, 1, 2), (8, 1, 1, 1, 3), (16, 2, 1, 1, 3), (16, 1, 1, 2, 3),
    (16, 1, 1, 3, 3), (8, 1, 1, 2, 3), (8, 1, 1, 3, 3), (16, 1, 1, 4, 3),
]  # fmt: skip


def random_packed(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tiled values and codes of a random bf16 weight on the GPU."""
    values = torch.randn(shape.out, shape.entries, device=DEVICE).bfloat16() * 0.02
    groups = shape.entries // shape.n
    draw = torch.rand(shape.lists, groups, shape.m, device=DEVICE)
    index = draw.topk(shape.n, -1).indices.sort(-1).values.flatten(1).to(torch.uint8)
    return tiled_from_canonical(values, index, shape)


def error(y: Tensor, want: Tensor) -> float:
    """The relative error of a product."""
    return float((y.double() - want).norm() / want.norm())


def rested() -> None:
    """Give back what earlier rows held."""
    gc.collect()
    torch.cuda.empty_cache()


WRONG = 0.01  # relative error; that of rounding is 0.002
FASTEST: dict[tuple[Shape, int], tuple[float, Plan]] = {}


# --- few tokens -------------------------------------------------------------------------------


def candidates(shape: Shape, tokens: int, card: Card, search: bool) -> list[Plan | None]:
    """The plan that is taken; with `search` some of every kernel's, and other products'."""
    taken = gpu_cuts.plan(shape, False, tokens, card)
    if not search or gpu_plan.why_no_fragments(shape):
        return [taken]
    likely = [*dict.fromkeys(gpu_cuts.near(shape, False, tokens, card))][:NEIGHBOURS]
    numbers = [(*one, "lookup") for one in LOOKUPS]
    numbers += [(*one, "groups") for one in GROUPS[: 4 if tokens < 5 else None]]
    made = (gpu_plan.make(shape, False, tokens, card, *one) for one in numbers)
    return [*dict.fromkeys([*likely, *(plan for plan in made if plan is not None)])]


def in_order(shape: Shape, tokens: int, card: Card, search: bool = True) -> list[Plan | None]:
    """The plan that is taken, and those whose x is put in order first."""
    made = (gpu_plan.make(shape, False, tokens, card, *one, kind="ready") for one in READY)
    taken = gpu_cuts.plan(shape, False, tokens, card)
    return [*dict.fromkeys([taken, *(plan for plan in made if plan is not None)])]


Points = Iterator[tuple[tuple[int, int], int, list[str]]]


def many_tokens_of_few() -> Points:
    """Layers and tokens of `ready`, with their patterns."""
    for tokens in (64, 32, 16):
        for layer in ((28672, 8192), (11008, 4096)):
            yield layer, tokens, ["1:8", "1:16", "1:4", "2:4"]


def points() -> Points:
    """Layers and tokens of `decode`, with their patterns."""
    for layers, patterns, tokens in DECODE:
        for count in tokens:
            for layer in layers:
                yield layer, count, patterns


def decode(search: bool) -> Iterator[Row]:
    """Few tokens; the rows that decide come first."""
    yield from few(points(), candidates, search)


def ready(search: bool = True) -> Iterator[Row]:
    """Rows of a search, of plans whose x is put in order first beside those that are taken."""
    yield from few(many_tokens_of_few(), in_order, True)


def few(of: Points, plans: Any, search: bool) -> Iterator[Row]:
    """A row for each plan of each product."""
    card = gpu_driver.driver(0).card
    for (out, inputs), tokens, patterns in of:
        rested()
        x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
        some = torch.randn(out, inputs, device=DEVICE).bfloat16() * 0.02
        ways: dict[str, Any] = dict(gpu_ways(some, None, x))
        xt = x.t().contiguous()
        ways["w @ xt"] = [partial(torch.matmul, w, xt) for w in (some, some.clone())] * 2
        best = min(t.median for t in time_on_gpu(ways).values())
        ways.clear()
        yield {
            "what": "dense", "out": out, "inputs": inputs, "tokens": tokens, "dense_us": best,
            "tb_per_s": some.nbytes / best / 1e6,
        }  # fmt: skip
        for spec in patterns:
            shape = Shape.of(out, inputs, spec)
            buffers = random_packed(shape)
            want = x.double() @ gpu.expand(*buffers, shape).double().t()
            count = copies_past_cache(sum(b.nbytes for b in buffers), buffers[0].device)
            many = [tuple(b.clone() for b in buffers) for _ in range(count)]
            size = sum(b.nbytes for b in buffers)
            taken = gpu_cuts.plan(shape, False, tokens, card)
            for plan in plans(shape, tokens, card, search):
                row: Row = {
                    "what": "search" if search else "decode", "out": out, "inputs": inputs,
                    "tokens": tokens, "pattern": spec, "dense_us": best, "taken": plan == taken,
                    "plan": plan and plan.told(),
                }  # fmt: skip
                if search and plan is not None and not compiled(plan.kernel):
                    continue
                calls = [partial(gpu.matmul, x, *b, None, shape) for b in many]
                planned = gpu._planned
                gpu._planned = lambda *args, plan=plan: plan  # pyright: ignore
                try:
                    row["error"] = error(calls[0](), want)
                    took = time_on_gpu({"packed": calls}, 6 if search else 20)["packed"].median
                except CompressError as problem:  # a plan that does not fit is a result
                    yield row | {"failed": str(problem)[:200]}
                    continue
                finally:
                    gpu._planned = planned
                if row["error"] > WRONG:
                    yield row | {"failed": "wrong"}
                    continue
                if plan is not None and took < FASTEST.get((shape, tokens), (took + 1, None))[0]:
                    FASTEST[shape, tokens] = took, plan
                yield row | {"packed_us": took, "ratio": best / took, "tb_per_s": size / took / 1e6}


# --- many tokens ------------------------------------------------------------------------------


def blocks(shape: Shape) -> list[gpu_panels.Block | gpu_panels.Group]:
    """Cuts of a product of panels that are worth a measurement."""
    Group, Block = gpu_panels.Group, gpu_panels.Block
    every = [
        Group(64, 256, 2, 32, 4, 2), Group(64, 256, 1, 32, 3, 3), Group(64, 128, 1, 32, 4, 4),
        Group(64, 256, 1, 32, 4, 2), Group(64, 512, 2, 32, 4, 1), Group(64, 512, 4, 32, 4, 1),
        Group(64, 256, 2, 64, 3, 1), Group(64, 256, 2, 32, 3, 2), Group(64, 128, 2, 32, 4, 3),
        Group(64, 128, 1, 64, 3, 3), Group(128, 256, 2, 32, 4, 1), Group(128, 128, 1, 32, 4, 2),
        Group(128, 256, 1, 32, 4, 1), Group(128, 128, 1, 64, 3, 2), Group(128, 256, 2, 64, 3, 1),
        Group(128, 128, 1, 32, 3, 2),
    ]  # fmt: skip
    card = gpu_driver.driver(0).card if torch.cuda.is_available() else Card()
    return [
        *(cut for cut in every if gpu_panels.shared_bytes(shape, cut, card)),
        *(Block(64, 32, tokens, tokens // 32, 4) for tokens in (128, 256)),
    ]


def panels(search: bool) -> Iterator[Row]:
    """Many tokens; `turn_us` is of turning x alone, `ready_us` of a product of x that is turned."""
    for (out, inputs), tokens, spec in MANY[:SEARCHED_PANELS] if search else MANY:
        rested()
        shape = Shape.of(out, inputs, spec)
        x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
        buffers = random_packed(shape)
        w = gpu.expand(*buffers, shape)
        xt = x.t().contiguous()
        ways = {"x @ wt": partial(F.linear, x, w), "w @ xt": partial(torch.matmul, w, xt)}
        ways["turn"] = partial(gpu_panels.turned, x)
        took = {n: t.median for n, t in time_on_gpu({n: [f] * 4 for n, f in ways.items()}).items()}
        best, turn = min(took["x @ wt"], took["w @ xt"]), took["turn"]
        want = x.double() @ w.double().t()
        for cut in blocks(shape) if search else [None]:
            row: Row = {
                "what": "panels-search" if search else "panels", "out": out, "inputs": inputs,
                "tokens": tokens, "pattern": spec, "dense_us": best, "turn_us": turn, "plan": cut,
                "taken": not search or cut == gpu_panels.group(shape, tokens),
            }  # fmt: skip
            call = partial(gpu.matmul, x, *buffers, None, shape)
            if cut is not None:
                call = partial(gpu_panels.matmul, x, *buffers, None, shape, cut=cut)
            ready = partial(call.func, xt.t(), *call.args[1:], **call.keywords)
            try:
                row["error"] = max(error(one(), want) for one in (call, ready))
                ways = {"packed": [call] * 4, "ready": [ready] * 4}
                one, other = (took.median for took in time_on_gpu(ways, 8).values())
                row |= {"packed_us": one, "ratio": best / one, "ready_us": other}
            except Exception as problem:  # noqa: BLE001 -- a cut that does not fit is a result
                row["failed"] = repr(problem)[:200]
            yield row


def warm(part: int, parts: int, seconds: float) -> None:
    """Compile training's kernels and every cut of `panels`, so that Triton's cache has them."""
    import _gpu_steps

    end = time.monotonic() + seconds
    for layer in _gpu_steps.layers()[part::parts]:
        if time.monotonic() < end:
            _gpu_steps.once(*layer)
    todo = []
    for (out, inputs), tokens, spec in MANY[:SEARCHED_PANELS]:
        shape = Shape.of(out, inputs, spec)
        if gpu_panels.serves(shape):
            cuts = blocks(shape)
            todo += [(shape, tokens, cut) for cut in cuts if isinstance(cut, gpu_panels.Block)]
    for shape, tokens, cut in todo[part::parts]:
        if time.monotonic() > end:
            return
        buffers = random_packed(shape)
        x = torch.randn(min(tokens, 256), shape.inputs, device=DEVICE).bfloat16()
        try:
            gpu_panels.matmul(x, *buffers, None, shape, cut=cut)
        except Exception as problem:  # noqa: BLE001 -- a cut that does not fit is a result
            print(shape, cut, repr(problem)[:200])
    torch.cuda.synchronize()


# --- networks and steps -----------------------------------------------------------------------


def llama(search: bool = False) -> Iterator[Row]:
    """Tokens a second of one sequence; a step is one CUDA graph, with a static cache."""
    import _llama

    planned = gpu._planned

    def fastest(
        shape: Shape, half: bool, tokens: int, card: Card, int8: bool = False
    ) -> Plan | None:
        found = None if int8 else FASTEST.get((shape, tokens))
        return found[1] if found else planned(shape, half, tokens, card, int8)

    gpu._planned = fastest  # pyright: ignore
    try:
        yield from _llama.tokens_a_second()
    finally:
        gpu._planned = planned


def roof(search: bool = False) -> Iterator[Row]:
    """Bytes that a copy of 2 GiB reads and writes a second."""
    some = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).zero_()
    other = torch.empty_like(some)
    took = time_on_gpu({"copy": [partial(other.copy_, some)] * 2})["copy"].median
    yield {"what": "roof", "packed_us": took, "tb_per_s": 2 * some.nbytes / took / 1e6}


def steps(search: bool = False) -> Iterator[Row]:
    """Training steps of feed-forward pairs of ViT-Base that are bound by launches."""
    import overhead

    args = argparse.Namespace(
        device=DEVICE, layers=12, amp=True, fused=True, pattern="1:16", rounds=11, graphed=False
    )
    for pattern, args.graphed in (("1:16", False), ("1:16", True), ("2:4", False)):
        args.pattern, args.rounds = pattern, 41 if args.graphed else 11
        with torch.enable_grad():
            found = overhead.measure(3152, args)
        for one in found:
            yield {
                "what": "steps", "tokens": 3152, "pattern": pattern,
                "plan": str(one["way"]) + ", in a CUDA graph" * args.graphed,
                "packed_us": float(str(one["ms"])) * 1e3, "ratio": one["ratio"],
                "failed": f"quartiles {one['ratio_q25']:.3f} {one['ratio_q75']:.3f}",
            }  # fmt: skip


def int8(search: bool = False) -> Iterator[Row]:
    """Few tokens, with 8-bit values; `ready_us` is the product of two bytes."""
    import _gpu_int8

    yield from _gpu_int8.products()


def three(search: bool = False) -> Iterator[Row]:
    """Forward, input gradient and weight gradient of layers in panels."""
    import _gpu_steps

    yield from _gpu_steps.products()


def train(search: bool = False) -> Iterator[Row]:
    """Training steps of networks whose layers compute on kept places."""
    import _gpu_steps

    yield from _gpu_steps.networks()


# --- without tables ---------------------------------------------------------------------------


def check(search: bool = False) -> Iterator[Row]:
    """Small products of every kind, once; all else is done on the CPU, which needs no checks."""
    cases = [("1:16", 3), ("2:4", 9), ("1:8", 1), ("1:32", 2), ("3:8", 1), ("1:16@16", 20)]
    for spec, tokens in [*cases, ("1:16", 64), ("1:4", 16), ("3:16", 70)]:
        shape = Shape.of(100, 1056 if "32" in spec else 1040, spec)
        w = torch.randn(shape.out, shape.inputs).bfloat16()
        w = w * mask(w, spec)
        buffers = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
        x, b = torch.randn(tokens, shape.inputs).bfloat16(), torch.randn(shape.out).bfloat16()
        values, codes = (t.to(DEVICE) for t in buffers)
        y = gpu.matmul(x.to(DEVICE), values, codes, b.to(DEVICE), shape, 2).cpu()
        want = (x.double() @ w.double().t() + b.double()).relu()
        yield {"what": "check", "pattern": spec, "tokens": tokens, "error": error(y, want)}
    yield from check_kinds()


def check_kinds() -> Iterator[Row]:
    """The kernels that no plan of the products above takes."""
    card, planned = gpu_driver.driver(0).card, gpu._planned
    cases: list[tuple[str, int, Any]] = [
        ("1:16", 1, (8, 2, 1, 1, 4, "lookup")), ("2:4", 3, (4, 1, 1, 2, 4, "lookup")),
        ("1:16", 64, (8, 2, 1, 1, 3, "groups")), ("2:4", 9, (4, 1, 1, 2, 3, "groups")),
        ("1:8", 64, (16, 1, 1, 1, 3, "ready")), ("2:4", 20, (8, 2, 1, 2, 2, "ready")),
        ("1:16@64", 150, gpu_panels.Group(64, 128, 2, 32, 3, 1)),
        ("1:16@128", 150, gpu_panels.Group(128, 128, 1, 32, 3, 1)),
    ]  # fmt: skip
    for spec, tokens, numbers in cases:
        shape = Shape.of(100, 1024, spec)
        w = torch.randn(shape.out, shape.inputs).bfloat16()
        w = w * mask(w, spec)
        buffers = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
        x = torch.randn(tokens, shape.inputs).bfloat16()
        there = [t.to(DEVICE) for t in (x, *buffers)]
        if isinstance(numbers, gpu_panels.Group):
            if not card.groups:
                continue
            y = gpu_panels.matmul(*there, bias=None, shape=shape, cut=numbers)
        else:
            plan = gpu_plan.make(shape, False, tokens, card, *numbers)
            if plan is None:
                continue
            gpu._planned = lambda *args, plan=plan: plan  # pyright: ignore
            try:
                y = gpu.matmul(*there, bias=None, shape=shape)
            finally:
                gpu._planned = planned
        want = x.double() @ w.double().t()
        yield {"what": "check", "pattern": spec, "tokens": tokens, "error": error(y.cpu(), want)}
    yield from check_int8()


def check_int8() -> Iterator[Row]:
    """8-bit values: look-ups, fragments, panels of them, and many tokens."""
    for spec, tokens in (("1:8", 1), ("2:4", 3), ("1:16", 20), ("1:16@16", 20), ("1:32", 70)):
        shape = Shape.of(100, 1024, spec)
        w = torch.randn(shape.out, shape.inputs)
        canonical = canonical_from_dense(w * mask(w, spec), shape)
        q, scale = stream_layout.round_values(canonical[0])
        stream = stream_layout.stream_from_canonical(q, scale, canonical[1], shape)
        x = torch.randn(tokens, shape.inputs).bfloat16()
        y = gpu.matmul_int8(x.to(DEVICE), stream.to(DEVICE), None, shape).cpu()
        want = x.double() @ stream_layout.dense(stream, shape).double().t()
        yield {"what": "check int8", "pattern": spec, "tokens": tokens, "error": error(y, want)}


_FOLDER: list[Path] = []


def _place(kernel: Kernel, architecture: int) -> Path | None:
    name = hashlib.sha256(repr((kernel, architecture)).encode()).hexdigest()[:24]
    return _FOLDER[0] / name if _FOLDER else None


def compiled(kernel: Kernel) -> bool:
    """Whether a kernel was compiled ahead; True where none was."""
    place = _place(kernel, gpu_driver.driver(0).architecture)
    return place is None or place.exists()


def keep_kernels(folder: Path) -> None:
    """Take kernels from a folder where they are there, and put them there where they are not."""
    folder.mkdir(parents=True, exist_ok=True)
    _FOLDER[:] = [folder]
    make = gpu_driver.compile_kernel

    def kept(kernel: Kernel, architecture: int) -> bytes:
        place = _place(kernel, architecture)
        assert place is not None
        if not place.exists():
            place.with_suffix(f".{time.monotonic_ns()}").write_bytes(make(kernel, architecture))
            next(folder.glob(f"{place.name}.*")).rename(place)
        return place.read_bytes()

    gpu_driver.compile_kernel = kept


def _compile_some(kernels: list[Kernel], end: float) -> int:
    os.nice(10)  # the tests that run beside it come first
    done = 0
    for kernel in kernels:
        if time.monotonic() < end:
            gpu_driver.compile_kernel(kernel, 90)
            done += 1
    return done


def compile_all(search: bool, workers: int, seconds: float) -> None:
    """Kernels for a card like an H100, those that no run has timed first, a search's last."""
    import _gpu_int8

    end, card = time.monotonic() + seconds, Card()
    kernels: dict[Kernel, None] = {Kernel("turn.cu", "turn"): None}
    kernels |= {Kernel("expand.cu", "expand"): None, Kernel("sum.cu", "sum", (("HALF", 0),)): None}
    for layer, tokens, patterns in many_tokens_of_few():
        for spec in patterns:
            for plan in in_order(Shape.of(*layer, spec), tokens, card):
                assert plan is not None
                kernels.setdefault(plan.kernel)
                tiles = ("NT", dict(plan.kernel.constants)["NT"])
                kernels.setdefault(Kernel("ready.cu", "ready", (tiles,)))
    kernels |= dict.fromkeys(_gpu_int8.kernels(card))
    for layer, tokens, spec in MANY:
        shape = Shape.of(*layer, spec)
        if "@" in spec:
            cuts = [gpu_panels.group(shape, tokens), *blocks(shape)]
            groups = [cut for cut in cuts if isinstance(cut, gpu_panels.Group)]
            kernels |= {gpu_panels.kernel_of(shape, cut, False, 0): None for cut in groups}
    for wide in (False, True) if search else (False,):
        for layer, tokens, patterns in points():
            for spec in patterns:
                for plan in candidates(Shape.of(*layer, spec), tokens, card, wide):
                    if plan is not None:
                        kernels.setdefault(plan.kernel)
    todo = list(kernels)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        shares = [(todo[i::workers], end) for i in range(workers)]
        print(f"{sum(pool.starmap(_compile_some, shares))} of {len(todo)} kernels compiled")


PARTS = {
    "decode": decode, "ready": ready, "panels": panels, "llama": llama, "roof": roof,
    "steps": steps, "int8": int8, "three": three, "train": train, "check": check,
}  # fmt: skip
TABLES = ["roof", "decode", "ready", "int8", "panels", "three", "train", "steps", "llama"]
FIELDS = [
    "what", "out", "inputs", "tokens", "pattern", "dense_us", "packed_us", "ready_us", "ratio",
    "tb_per_s", "turn_us", "tokens_per_s", "error", "taken", "plan", "failed", "device", "torch",
]  # fmt: skip


def best_of(rows: list[Row]) -> Iterator[str]:
    """A line for each product that was searched: the best plan beside the taken one."""
    products: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "ratio" in row and row["what"] in ("search", "panels-search"):
            key = tuple(row[k] for k in ("what", "out", "inputs", "tokens", "pattern"))
            products.setdefault(key, []).append(row)
    for key, found in products.items():
        best = max(found, key=lambda one: one["ratio"])
        taken = next((f"{one['ratio']:.2f}" for one in found if one["taken"]), "-")
        yield f"{key}: best {best['ratio']:.2f}, taken {taken}, of {len(found)}: {best['plan']}"


def measure(names: list[str], args: argparse.Namespace) -> None:
    """Run parts, row by row; a part that fails is told, and the next one follows."""
    begin = time.monotonic()
    end = begin + args.seconds
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    file = args.csv.open("a", newline="") if args.csv else None
    writer = csv.DictWriter(file, FIELDS) if file else None
    if writer and file and not file.tell():
        writer.writeheader()
    rows: list[Row] = []
    todo = [(name, False) for name in names]
    if args.search:  # the network then takes the fastest plans
        last = [(name, False) for name in ("llama", "steps") if name in names]
        found = [(name, True) for name in ("panels", "decode") if name in names]
        todo = [one for one in todo if one not in last] + found + last
    for name, search in todo:
        print(f"--- {name}{', searched' * search}, {time.monotonic() - begin:.0f} s", flush=True)
        try:
            for row in PARTS[name](search):
                rows.append(row)
                short = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                print(*(f"{k}={v}" for k, v in short.items()), flush=True)
                if writer and file:
                    writer.writerow({**short, **where})
                    file.flush()
                if time.monotonic() > end - LATER * search:
                    print(f"stopped after {time.monotonic() - begin:.0f} seconds", flush=True)
                    break
        except Exception:  # noqa: BLE001 -- the other parts are worth their time
            print(traceback.format_exc(), flush=True)
            print(f"{name} failed", flush=True)
    print(*best_of(rows), sep="\n", flush=True)


def main() -> None:
    """Run some parts, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "tables", "compile", "warm"])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--kernels", type=Path, help="a folder of compiled kernels")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    if args.kernels:
        keep_kernels(args.kernels)
    if args.parts == ["compile"]:
        compile_all(args.search, args.workers, args.seconds)
    elif args.parts == ["warm"]:
        context = multiprocessing.get_context("spawn")
        each = [(i, args.workers, args.seconds) for i in range(args.workers)]
        running = [context.Process(target=warm, args=some) for some in each]
        for process in running:
            process.start()
        for process in running:
            process.join()
        sys.exit(any(process.exitcode for process in running))
    else:
        measure(TABLES if args.parts == ["tables"] else args.parts, args)


if __name__ == "__main__":
    with torch.no_grad():
        main()
