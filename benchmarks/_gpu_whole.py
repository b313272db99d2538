"""What is around products on a GPU: a whole network, steps that are bound by launches, memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

import _gpu
from _gpu import Row, timed
from nmflow.kernels import gpu
from nmflow.kernels.gpu_plan import Card, Plan
from nmflow.kernels.layout import Shape


def llama(search: bool = False) -> Iterator[Row]:
    """Tokens a second of one sequence; a step is one CUDA graph, with a static cache."""
    import _llama

    planned = gpu._planned

    def fastest(
        shape: Shape, half: bool, tokens: int, card: Card, int8: bool = False
    ) -> Plan | None:
        found = None if int8 else _gpu.FASTEST.get((shape, tokens))
        return found[1] if found else planned(shape, half, tokens, card, int8)

    gpu._planned = fastest  # pyright: ignore
    try:
        yield from _llama.tokens_a_second()
    finally:
        gpu._planned = planned


def roof(search: bool = False) -> Iterator[Row]:
    """Bytes that a copy of 2 GiB reads and writes a second."""
    some = torch.empty(1 << 30, dtype=torch.uint8, device=_gpu.DEVICE).zero_()
    other = torch.empty_like(some)
    us = timed({"copy": [partial(other.copy_, some)] * 2})["copy"]
    yield {"what": "roof", "packed_us": us, "tb_per_s": 2 * some.nbytes / us / 1e6}


def steps(search: bool = False) -> Iterator[Row]:
    """Training steps of feed-forward pairs of ViT-Base that are bound by launches."""
    import overhead

    for pattern, graphed in (("1:16", False), ("1:16", True), ("2:4", False)):
        args = argparse.Namespace(
            device=_gpu.DEVICE, layers=12, amp=True, fused=True, pattern=pattern, graphed=graphed,
            rounds=41 if graphed else 11,
        )  # fmt: skip
        with torch.enable_grad():
            found = overhead.measure(3152, args)
        for one in found:
            yield {
                "what": "steps", "tokens": 3152, "pattern": pattern,
                "plan": str(one["way"]) + ", in a CUDA graph" * graphed,
                "packed_us": float(str(one["ms"])) * 1e3, "ratio": one["ratio"],
                "failed": f"quartiles {one['ratio_q25']:.3f} {one['ratio_q75']:.3f}",
            }  # fmt: skip
