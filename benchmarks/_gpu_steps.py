"""Training on panels on a GPU: three products of a layer, and whole steps of networks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmflow
from nmflow.kernels import gpu_steps
from nmflow.kernels.layout import Shape
from nmflow.masks import mask
from nmflow.packed.measure import time_on_gpu

DEVICE = "cuda"
LAYERS = [
    ((11008, 4096), 4096, "1:16@128"), ((11008, 4096), 4096, "1:16@64"),
    ((4096, 11008), 4096, "1:16@128"), ((11008, 4096), 4096, "1:8@128"),
    ((3072, 768), 25216, "1:16@128"), ((768, 3072), 25216, "1:16@128"),
]  # fmt: skip
# What sums of entries are kept in, and how many bytes of them there are.
SUMS = [
    (torch.float32, 128 << 20), (torch.float32, 24 << 20), (torch.float32, 1 << 30),
    (torch.bfloat16, 128 << 20), (torch.bfloat16, 24 << 20), (torch.bfloat16, 1 << 30),
]  # fmt: skip


def _took(ways: dict[str, Any]) -> dict[str, float]:
    timed = time_on_gpu({name: [way] * 2 for name, way in ways.items()}, 8)
    return {name: one.median for name, one in timed.items()}


def layers() -> list[tuple[tuple[int, int], int, str]]:
    """Layers, tokens and patterns of all that is timed, each once."""
    found = dict.fromkeys(LAYERS)
    for width, inner, _, batch, tokens in NETWORKS.values():
        sizes = (3 * width, width), (width, width), (inner, width), (width, inner)
        found |= dict.fromkeys((size, batch * tokens, "1:16@128") for size in sizes)
    return list(found)


def once(layer: tuple[int, int], tokens: int, spec: str) -> None:
    """All products of a layer, once, so that their kernels are compiled."""
    shape = Shape.of(*layer, spec)
    w = torch.zeros(layer, device=DEVICE)
    x, dy = (torch.zeros(tokens, n, device=DEVICE).bfloat16() for n in layer[::-1])
    packed = gpu_steps.pack(w, None, shape, torch.bfloat16)
    gpu_steps.forward(x, w, *packed, None, shape)
    before = gpu_steps.PARTIAL
    try:
        for gpu_steps.PARTIAL in (torch.float32, torch.bfloat16):
            gpu_steps.input_grad(dy, w, *packed, shape)
    finally:
        gpu_steps.PARTIAL = before
    gpu_steps.weight_grad(x, dy, *packed[1:], shape, torch.float32)


def products() -> Iterator[dict[str, Any]]:
    """A row for each product of a layer, and for input gradients of other sums."""
    for (out, inputs), tokens, spec in LAYERS:
        shape = Shape.of(out, inputs, spec)
        w = torch.randn(out, inputs, device=DEVICE)
        w *= mask(w, spec)
        x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
        dy = torch.randn(tokens, out, device=DEVICE).bfloat16()
        half = w.bfloat16()
        packed = gpu_steps.pack(w, None, shape, torch.bfloat16)
        dense = {
            "pack": w.bfloat16, "forward": partial(F.linear, x, half),
            "input gradient": partial(torch.matmul, dy, half),
            "weight gradient": partial(torch.matmul, dy.t(), x),
        }  # fmt: skip
        own = {
            "pack": partial(gpu_steps.pack, w, None, shape, torch.bfloat16),
            "forward": partial(gpu_steps.forward, x, w, *packed, None, shape),
            "input gradient": partial(gpu_steps.input_grad, dy, w, *packed, shape),
            "weight gradient": partial(
                gpu_steps.weight_grad, x, dy, *packed[1:], shape, torch.float32
            ),
        }
        row = {"what": "three", "out": out, "inputs": inputs, "tokens": tokens, "pattern": spec}
        theirs, ours = _took(dense), _took(own)
        kept = w != 0
        for name, one in own.items():
            error = None
            if name != "pack":
                want = dense[name]().float()
                want = want * kept if name.startswith("weight") else want
                error = float((one().float() - want).norm() / want.norm())
            yield {
                **row, "plan": name, "dense_us": theirs[name], "packed_us": ours[name],
                "ratio": theirs[name] / ours[name], "error": error, "taken": True,
            }  # fmt: skip
        total = {key: sum(took.values()) for key, took in (("dense", theirs), ("own", ours))}
        yield {
            **row, "plan": "all", "dense_us": total["dense"], "packed_us": total["own"],
            "ratio": total["dense"] / total["own"], "taken": True,
        }  # fmt: skip
        before = gpu_steps.PARTIAL, gpu_steps.SCRATCH
        try:
            for gpu_steps.PARTIAL, gpu_steps.SCRATCH in SUMS[1:]:
                took = _took({"own": own["input gradient"]})["own"]
                name = "input gradient"
                yield {
                    **row, "dense_us": theirs[name], "packed_us": took, "taken": False,
                    "ratio": theirs[name] / took,
                    "plan": f"{name}, {gpu_steps.PARTIAL}, {gpu_steps.SCRATCH >> 20} MB",
                }  # fmt: skip
        finally:
            gpu_steps.PARTIAL, gpu_steps.SCRATCH = before


class Block(nn.Module):
    """A layer of a transformer: attention, and a feed-forward pair."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, tokens, width)` to the same."""
        batch, tokens, width = x.shape
        heads = self.qkv(self.first(x)).view(batch, tokens, 3, width // 64, 64)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


# Width, inner width, layers, batch, tokens of a row.
NETWORKS = {
    "ViT-Base": (768, 3072, 12, 64, 197),
    "ViT-Large": (1024, 4096, 12, 64, 197),
    "7B-wide": (4096, 11008, 2, 4, 1024),
}
WAYS = ("dense", "held", "kept places", "auto")


def _step_ms(network: str, way: str, rounds: int = 7) -> tuple[float, str]:
    """Milliseconds of a training step in the sparse phase, and how a layer computes."""
    width, inner, layers, batch, tokens = NETWORKS[network]
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, inner) for _ in range(layers))).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    said = ""
    flow: Any = None
    if way != "dense":
        mode: Any = {"held": "off", "kept places": "on", "auto": "auto"}[way]
        flow = nmflow.attach(
            model, optimizer, nmflow.OneShot(dense=0), "1:16@128", include="*", total_steps=1000,
            freeze_mask=True, sparse_steps=mode,
        )  # fmt: skip
    x = torch.randn(batch, tokens, width, device=DEVICE)
    took = []
    for k in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        end.record()
        end.synchronize()
        if k > 2:
            took.append(start.elapsed_time(end))
    if flow is not None:
        found = flow.explain().layers
        said = f"{sum(one.sparse for one in found)} of {len(found)} layers on kept places"
    return sorted(took)[len(took) // 2], said


def networks() -> Iterator[dict[str, Any]]:
    """A row for each network and way."""
    for network, (width, _, _, batch, tokens) in NETWORKS.items():
        dense = 0.0
        for way in WAYS:
            gc.collect()
            torch.cuda.empty_cache()
            with torch.enable_grad():
                ms, said = _step_ms(network, way)
            dense = dense or ms
            yield {
                "what": "train", "inputs": width, "tokens": batch * tokens, "pattern": "1:16@128",
                "plan": f"{network}, {way}", "dense_us": dense * 1e3, "packed_us": ms * 1e3,
                "ratio": dense / ms, "failed": said,
            }  # fmt: skip
