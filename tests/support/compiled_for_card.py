"""Triton kernels compiled for a card that is not there: every launch of the library's own calls.

A program of its own, since Triton chooses its interpreter when it is imported:

    python tests/support/compiled_for_card.py CAPABILITY PART...

The calls get tensors without memory. A launch goes through Triton's own specialization (numbers
that are 1, or multiples of 16; addresses) and its compilers, down to machine code, and nothing
runs. Each variant that is compiled is a line of JSON, and the first that is not ends the program.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cubins import local_bytes
from nmflow.kernels import gpu_panels, gpu_panels_kernel, gpu_steps, gpu_steps_kernel
from nmflow.kernels.gpu_panels import Block
from nmflow.kernels.layout import Shape
from nmflow.masks import Job, launches_of, triton_kernel
from nmflow.masks import triton as masks_triton
from nmflow.masks.launches import Prints
from nmflow.pattern import Pattern

MODULES = gpu_panels_kernel, gpu_steps_kernel, triton_kernel
HALVES = torch.bfloat16, torch.float16
FLOATS = torch.float32, *HALVES
Case = tuple[str, int, int, int]  # pattern, out, inputs, tokens

# Tails of rows, entries and tokens, and numbers that are 1, which Triton makes constants.
SMALL: list[Case] = [
    ("1:16@64", 150, 272, 70), ("1:8@128", 200, 136, 300), ("1:16@64", 1, 16, 1),
]  # fmt: skip
# Groups of every size, and layers of networks.
MORE: list[Case] = [
    ("2:32@64", 70, 320, 33), ("1:12@192", 192, 144, 16), ("1:4@64", 65, 4, 3),
    ("16:256@64", 2000, 256, 63), ("1:256@64", 64, 768, 20), ("1:16@128", 768, 3072, 25_216),
    ("1:16@64", 28_672, 8192, 4096), ("1:8@128", 11_008, 4096, 4096),
]  # fmt: skip


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


def products(case: Case, dtype: torch.dtype, wide: torch.dtype) -> None:
    """The three products of a training step, and what packs their weight."""
    spec, out, inputs, tokens = case
    shape = Shape.of(out, inputs, spec)
    w, bias = empty(out, inputs, dtype=wide), empty(out, dtype=wide)
    x, dy = (empty(tokens, n, dtype=dtype) for n in (inputs, out))
    gpu_steps.pack(w, empty(out, -(-inputs // 8), dtype=torch.uint8), shape, dtype)
    packed = gpu_steps.pack(w, None, shape, dtype)
    for some in (None, bias):
        gpu_steps.forward(x, w, *packed, some, shape)
    gpu_steps.input_grad(dy, w, *packed, shape)
    gpu_steps.weight_grad(x, dy, *packed[1:], shape, wide)


def sample() -> None:
    """Some products of one shape."""
    spec, out, inputs, tokens = SMALL[0]
    shape, w = Shape.of(out, inputs, spec), empty(out, inputs)
    packed = gpu_steps.pack(w, None, shape, torch.bfloat16)
    gpu_steps.input_grad(empty(tokens, out, dtype=torch.bfloat16), w, *packed, shape)


def steps() -> None:
    """Every dtype of a step."""
    for dtype in HALVES:
        for wide in (torch.float32, dtype):
            products(SMALL[0], dtype, wide)
    for case in SMALL[1:]:
        products(case, torch.bfloat16, torch.float32)


def layers() -> None:
    """Constants of every size; the sums of a benchmark too."""
    for case in MORE:
        products(case, torch.bfloat16, torch.float32)
    gpu_steps.PARTIAL = torch.bfloat16
    products(MORE[-1], torch.bfloat16, torch.float32)


def panels() -> None:
    """Both cuts of cards without warp groups, and every epilogue."""
    for dtype, epilogue in itertools.product(HALVES, range(3)):
        for spec, out, inputs, tokens in (SMALL[0], MORE[-2]):
            shape = Shape.of(out, inputs, spec)
            values, codes = (
                empty(*size, dtype=kind)
                for size, kind in zip(
                    shape.tiled_sizes(dtype), (dtype, shape.code_dtype()), strict=True
                )
            )
            x, bias = empty(tokens, inputs, dtype=dtype), empty(out, dtype=dtype)
            for cut in (Block(64, 32, 256, 8, 4), Block(64, 32, 128, 4, 4)):
                for some in (None, bias) if epilogue == 0 else (bias,):
                    gpu_panels.matmul(x, values, codes, some, shape, epilogue, cut)


MASKS = ["1:16", "2:4", "4:4", "3:6", "16:256", "1:5"]


def masks() -> None:
    """A mask and a projection of one weight, along each axis, and of many at once."""
    for i, (dtype, spec) in enumerate(itertools.product(FLOATS, MASKS)):
        p, dim = Pattern(spec), i % 2
        size = (p.m * 3, 48) if dim == 0 else (48, p.m * 3)
        w = empty(*size, dtype=dtype)
        masks_triton.project(w, p, dim, mask=empty(*size, dtype=torch.bool))
        masks_triton.project(w, p, dim, 0.5, out=w)
        masks_triton.project(w, p, dim, 1.0, out=w, values=w, pull=0.5, scale=empty())


def many() -> None:
    """Launches for many weights, also at addresses that are no multiples of 16."""
    for (dtype, spec), dim in itertools.product(zip(FLOATS, MASKS, strict=False), (0, 1)):
        p, scale = Pattern(spec), empty()
        w = empty(48, 48, dtype=dtype)
        for held in (None, empty(48, 48, dtype=torch.bool)):
            (launch,) = launches_of([Job(w, p, dim, held)] * 2)
            at, odd = [0, 0], [2, 2]
            for places, delta in itertools.product((at, odd), (0.5, empty())):
                launch(places, delta=delta)
                launch(places, places, delta=delta)
            launch(at, at, delta=1.0, pull=0.5, scale=scale)
            launch(at, at, delta=1.0, pull=0.5)
            launch(delta=1.0, pull=-1.0, scale=scale)


def prints() -> None:
    """Fingerprints of words of every size."""
    for words, step in itertools.product((torch.int16, torch.int32, torch.int64), (1, 7, 4096)):
        odd = torch.zeros(step, dtype=torch.int64)
        Prints([empty(5, step)] * 2, [odd] * 2, words)()


PARTS: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (sample, steps, layers, panels, masks, many, prints)
}


class Card:
    """What Triton asks of its driver before it launches anything."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        """The card that is compiled for."""
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """A number under which Triton keeps what it has compiled."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0


class Launched:
    """A kernel whose launches are compiled, and told where they are new."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self._known = kernel, set[int]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **more: Any) -> None:
            found = self._kernel.run(*args, grid=grid, warmup=True, **more)
            found = found.result() if hasattr(found, "result") else found
            if id(found) not in self._known:
                self._known.add(id(found))
                given = {name: more[name] for name in ("ALIGNED", "AXIS") if name in more}
                print(json.dumps(told(found) | given), flush=True)

        return run


def told(found: Any) -> dict[str, Any]:
    """What a compiled kernel needs of a card."""
    text = found.asm["ptx"]
    kinds = "wgmma.mma_async", "tcgen05.mma", "mma.sync"
    return {
        "kernel": found.metadata.name, "shared": found.metadata.shared,
        "threads": found.metadata.num_warps * 32, "local": local_bytes(found.asm["cubin"]),
        "products": next((kind for kind in kinds if kind in text), ""),
        "wide": [name for name in ("ld.global.v4", "st.global.v4", "cp.async") if name in text],
    }  # fmt: skip


def launches() -> Iterator[tuple[Any, str, Any]]:
    """Every kernel that is launched, and where it is."""
    for module in MODULES:
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and not name.startswith("_"):
                yield module, name, kernel


if __name__ == "__main__":
    driver.set_active(Card(int(sys.argv[1])))  # pyright: ignore[reportArgumentType]
    for module, name, kernel in list(launches()):
        setattr(module, name, Launched(kernel))
    with torch.no_grad():
        for part in sys.argv[2:]:
            PARTS[part]()
