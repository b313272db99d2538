"""Kernels compiled before they are timed, on many cores: by NVRTC into a folder, and by Triton."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch

import _gpu
import _gpu_decode
import _gpu_int8
import _gpu_panels
import _gpu_steps
from nmflow.kernels import gpu_driver, gpu_panels
from nmflow.kernels.gpu_panels import Block, Group
from nmflow.kernels.gpu_plan import Card, Kernel, Plan
from nmflow.kernels.layout import Shape

ARCHITECTURE = 90


def kernels(search: bool, card: Card | None = None) -> list[Kernel]:
    """All that is timed on a card like an H100: what no run has timed first, a search's last."""
    card = card or Card()
    return [*dict.fromkeys(_kernels(search, card))]


def _kernels(search: bool, card: Card) -> Iterator[Kernel]:
    yield Kernel("turn.cu", "turn")
    yield Kernel("expand.cu", "expand")
    yield Kernel("sum.cu", "sum", (("HALF", 0),))
    for layer, tokens, patterns in _gpu_decode.points_in_order():
        for spec in patterns:
            for plan in _gpu_decode.in_order(Shape.of(*layer, spec), tokens, card):
                yield from _of(plan)
    yield from _gpu_int8.kernels(card)
    for shape, tokens in _gpu_panels.searched():
        for cut in (gpu_panels.group(shape, tokens), *_gpu_panels.cuts(shape, card)):
            if isinstance(cut, Group):
                yield gpu_panels.kernel_of(shape, cut, False, 0)
    for wide in (False, True) if search else (False,):
        for layer, tokens, patterns in _gpu_decode.points():
            for spec in patterns:
                for plan in _gpu_decode.candidates(Shape.of(*layer, spec), tokens, card, wide):
                    yield from _of(plan)


def _of(plan: Plan | None) -> Iterator[Kernel]:
    if plan is not None:
        yield plan.kernel
        if plan.ready:
            yield Kernel("ready.cu", "ready", (("NT", dict(plan.kernel.constants)["NT"]),))


def _compile_some(todo: list[Kernel], end: float) -> int:
    os.nice(10)  # the tests that run beside it come first
    done = 0
    for kernel in todo:
        if time.monotonic() < end:
            gpu_driver.compile_kernel(kernel, ARCHITECTURE)
            done += 1
    return done


def compile_all(search: bool, workers: int, seconds: float) -> None:
    """Compile into the folder of kernels, where there is one."""
    end, todo = time.monotonic() + seconds, kernels(search)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        shares = [(todo[i::workers], end) for i in range(workers)]
        print(f"{sum(pool.starmap(_compile_some, shares))} of {len(todo)} kernels compiled")


def warm_all(workers: int, seconds: float) -> int:
    """Compile what is in Triton, in so many processes; how many of them had a failure."""
    context = multiprocessing.get_context("spawn")
    each = [(i, workers, seconds) for i in range(workers)]
    running = [context.Process(target=warm, args=some) for some in each]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return sum(process.exitcode != 0 for process in running)


def warm(part: int, parts: int, seconds: float) -> None:
    """Run a share of training's products and of the cuts of panels, so that Triton keeps them."""
    end, done, failed = time.monotonic() + seconds, 0, 0
    todo: list[Callable[[], None]] = []
    todo += [partial(_gpu_steps.once, *layer) for layer in _gpu_steps.layers()][part::parts]
    todo += [
        partial(_panels_once, shape, tokens, cut)
        for shape, tokens in _gpu_panels.searched()
        if gpu_panels.serves(shape)
        for cut in _gpu_panels.cuts(shape, _gpu.card())
        if isinstance(cut, Block)
    ][part::parts]
    with torch.no_grad():
        for one in todo:
            if time.monotonic() > end:
                break
            try:
                one()
                done += 1
            except Exception:  # noqa: BLE001 -- the others are worth their time
                failed += 1
                print(one, traceback.format_exc(limit=-4), flush=True)
    torch.cuda.synchronize()
    print(f"{done} of {len(todo)} compiled, {failed} failed")
    sys.exit(failed > 0)


def _panels_once(shape: Shape, tokens: int, cut: Block) -> None:
    x = torch.randn(min(tokens, 256), shape.inputs, device=_gpu.DEVICE).bfloat16()
    gpu_panels.matmul(x, *_gpu.random_packed(shape), None, shape, cut=cut)
