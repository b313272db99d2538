"""Training on panels on a GPU: three products of a layer, and whole steps of networks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _gpu
import nmflow
from _gpu import Row, timed
from nmflow.kernels import gpu_steps
from nmflow.kernels.layout import Shape
from nmflow.masks import mask

LAYERS = [
    ((11008, 4096), 4096, "1:16@128"), ((11008, 4096), 4096, "1:16@64"),
    ((4096, 11008), 4096, "1:16@128"), ((11008, 4096), 4096, "1:8@128"),
    ((3072, 768), 25216, "1:16@128"), ((768, 3072), 25216, "1:16@128"),
]  # fmt: skip
ROUNDS = 8
# What sums of entries are kept in, and how many bytes of them there are.
SUMS = [  # the first is the library's
    (torch.float32, 128 << 20), (torch.float32, 24 << 20), (torch.float32, 1 << 30),
    (torch.bfloat16, 128 << 20), (torch.bfloat16, 24 << 20), (torch.bfloat16, 1 << 30),
]  # fmt: skip


@contextlib.contextmanager
def sums_of(kind: torch.dtype, scratch: int) -> Iterator[None]:
    """Input gradients are added up of sums of a dtype, in so many bytes."""
    before = gpu_steps.PARTIAL, gpu_steps.SCRATCH
    gpu_steps.PARTIAL, gpu_steps.SCRATCH = kind, scratch
    try:
        yield
    finally:
        gpu_steps.PARTIAL, gpu_steps.SCRATCH = before


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
    w = torch.zeros(layer, device=_gpu.DEVICE)
    x, dy = (torch.zeros(tokens, n, device=_gpu.DEVICE).bfloat16() for n in layer[::-1])
    own, _ = ways(shape, w, x, dy)
    for way in own.values():
        way()
    with sums_of(*SUMS[-1]):
        own["input gradient"]()


def ways(shape: Shape, w: Tensor, x: Tensor, dy: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a training step does with a layer: on kept places, and dense."""
    packed, half = gpu_steps.pack(w, None, shape, x.dtype), w.to(x.dtype)
    own = {
        "pack": partial(gpu_steps.pack, w, None, shape, x.dtype),
        "forward": partial(gpu_steps.forward, x, w, *packed, None, shape),
        "input gradient": partial(gpu_steps.input_grad, dy, w, *packed, shape),
        "weight gradient": partial(gpu_steps.weight_grad, x, dy, *packed[1:], shape, w.dtype),
    }
    dense = {
        "pack": partial(w.to, x.dtype), "forward": partial(F.linear, x, half),
        "input gradient": partial(torch.matmul, dy, half),
        "weight gradient": partial(torch.matmul, dy.t(), x),
    }  # fmt: skip
    return own, dense


def products(search: bool = False) -> Iterator[Row]:
    """A row for each product of a layer, and for input gradients of other sums."""
    for (out, inputs), tokens, spec in LAYERS:
        _gpu.rested()
        shape = Shape.of(out, inputs, spec)
        w = torch.randn(out, inputs, device=_gpu.DEVICE)
        w *= mask(w, spec)
        x, dy = (torch.randn(tokens, n, device=_gpu.DEVICE).bfloat16() for n in (inputs, out))
        own, dense = ways(shape, w, x, dy)
        row: Row = {"what": "three", "out": out, "inputs": inputs, "tokens": tokens,
                    "pattern": spec, "taken": True}  # fmt: skip
        theirs = timed({name: [way] * 2 for name, way in dense.items()}, ROUNDS)
        rows = []
        for name, way in own.items():
            wanted = None if name == "pack" else partial(_wanted, name, dense[name], w)
            known = {"plan": name, "dense_us": theirs[name]}
            rows.append(_gpu.tried(row | known, partial(_timed, way, theirs[name], wanted)))
            yield rows[-1]
        if not any("failed" in one for one in rows):
            total = {key: sum(one[key] for one in rows) for key in ("dense_us", "packed_us")}
            ratio = total["dense_us"] / total["packed_us"]
            yield {**row, "plan": "all", **total, "ratio": ratio}
        name = "input gradient"
        for kind, scratch in SUMS[1:]:
            plan = f"{name}, {kind}, {scratch >> 20} MB"
            known = {"plan": plan, "dense_us": theirs[name], "taken": False}
            with sums_of(kind, scratch):
                made = _gpu.tried(row | known, partial(_timed, own[name], theirs[name]))
            yield made


def _wanted(name: str, dense: Callable[[], Tensor], w: Tensor) -> Tensor:
    want = dense().float()
    return want * (w != 0) if name == "weight gradient" else want


def _timed(
    way: Callable[[], Any], theirs: float, wanted: Callable[[], Tensor] | None = None
) -> Row:
    wrong = _gpu.error(way().float(), wanted()) if wanted else None
    us = timed({"own": [way] * 2}, ROUNDS)["own"]
    return {"packed_us": us, "ratio": theirs / us, "error": wrong}


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
WAYS = {"dense": None, "held": "off", "kept places": "on", "auto": "auto"}  # `sparse_steps`


def _step_ms(network: str, way: str, rounds: int = 7) -> tuple[float, str]:
    """Milliseconds of a training step in the sparse phase, and how a layer computes."""
    width, inner, layers, batch, tokens = NETWORKS[network]
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, inner) for _ in range(layers))).to(_gpu.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mode: Any = WAYS[way]
    flow: Any = None
    if mode is not None:
        flow = nmflow.attach(
            model, optimizer, nmflow.OneShot(dense=0), "1:16@128", include="*", total_steps=1000,
            freeze_mask=True, sparse_steps=mode,
        )  # fmt: skip
    x = torch.randn(batch, tokens, width, device=_gpu.DEVICE)
    took = []
    for k in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.zero_grad()
        with torch.autocast(_gpu.DEVICE, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        end.record()
        end.synchronize()
        if k > 2:
            took.append(start.elapsed_time(end))
    said = ""
    if flow is not None:
        found = flow.explain().layers
        said = f"{sum(one.sparse for one in found)} of {len(found)} layers on kept places"
    return sorted(took)[len(took) // 2], said


def networks(search: bool = False) -> Iterator[Row]:
    """A row for each network and way; `failed` says how many layers took it."""
    for network, (width, _, _, batch, tokens) in NETWORKS.items():
        dense = 0.0
        for way in WAYS:
            _gpu.rested()
            row: Row = {"what": "train", "inputs": width, "tokens": batch * tokens,
                        "pattern": "1:16@128", "plan": f"{network}, {way}"}  # fmt: skip
            row = _gpu.tried(row, partial(_network, network, way, dense))
            dense = dense or row.get("packed_us", 0.0)
            yield row


def _network(network: str, way: str, dense: float) -> Row:
    with torch.enable_grad():
        ms, said = _step_ms(network, way)
    us = ms * 1e3
    dense = dense or us
    return {"dense_us": dense, "packed_us": us, "ratio": dense / us, "failed": said}
