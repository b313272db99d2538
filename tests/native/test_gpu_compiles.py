"""NVRTC compiles every kernel that a plan takes, for cards that are not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_gpu_decode import needs_nvrtc

import cubins
from nmflow.kernels import gpu_cuts, gpu_driver, gpu_panels, gpu_plan
from nmflow.kernels.gpu_panels import Group
from nmflow.kernels.gpu_plan import Card, Kernel, Plan
from nmflow.kernels.layout import Shape

pytestmark = needs_nvrtc
LAYERS = [(28672, 8192), (11008, 4096), (768, 3072)]
# Multiprocessors, bytes that a block shares: an A100, an H100, a B200, a card of consumers.
CARDS = {
    80: Card(108, 166_912, groups=False), 90: Card(), 100: Card(148, 232_448, groups=False),
    120: Card(170, 101_376, groups=False),
}  # fmt: skip
# Whether the dtype is float16, whether values are of 8 bits, and tokens of each of the LAYERS.
CALLS = [
    (False, False, (1, 16, 4)), (False, False, (64, 1, 64)), (True, False, (4, 64, 16)),
    (False, True, (1, 16, 1)), (True, True, (16, 4, 64)),
]  # fmt: skip
SPECS = ["1:4", "2:4", "1:8", "3:8", "1:16", "1:32", "2:64", "1:256", "1:16@16", "1:8@4"]


# Bytes of a thread in local memory, at most, by NVRTC 13.5; other plans than these have none.
# sm_90, float16: 3:8 with 8-bit values (112), warp groups at 64 tokens with M from 32 on (24).
# sm_100: 2:4 at 64 tokens by 16 warps (8). sm_120: the same (40), 1:32 with 8-bit values (24).
MOST_LOCAL = {90: 112, 100: 8, 120: 40}


def compile_all(kernels: Iterator[Kernel], architecture: int) -> int:
    """How many there are; each stays in registers, but for what is known."""
    every = list(dict.fromkeys(kernels))
    for kernel in every:
        code = gpu_driver.compile_kernel(kernel, architecture)
        assert code[:4] == b"\x7fELF", "PTX, which the driver would compile at its first launch"
        if cubins.tool():
            assert cubins.local_bytes(code) <= MOST_LOCAL.get(architecture, 0), kernel
    return len(every)


def of(plan: Plan | None, half: bool) -> Iterator[Kernel]:
    """The kernels that a plan launches."""
    if plan is None:
        return
    yield plan.kernel
    if plan.shares > 1:
        yield Kernel("sum.cu", "sum", (("HALF", int(half)),))
    if plan.ready:
        yield Kernel("ready.cu", "ready", (("NT", dict(plan.kernel.constants)["NT"]),))


def taken(spec: str, card: Card) -> Iterator[Kernel]:
    """Of a pattern: those of the plans that are taken, and of many tokens."""
    for half, int8, tokens in CALLS:
        for layer, count in zip(LAYERS, tokens, strict=True):
            yield from of(gpu_cuts.plan(Shape.of(*layer, spec), half, count, card, int8), half)
    shape = Shape.of(*LAYERS[-1], spec)
    for half in (0, 1):
        constants = {"N": shape.n, "M": shape.m, "HALF": half}
        yield Kernel("widen.cu", "widen", tuple(constants.items()))


def of_many_tokens() -> Iterator[Kernel]:
    """What turns x and expands weights, and panels by warp groups in each cut that is taken."""
    yield from (Kernel("turn.cu", "turn"), Kernel("expand.cu", "expand"))
    for spec, tokens in (("1:16@64", 4096), ("1:8@128", 4096), ("2:32@192", 70)):
        shape = Shape.of(11008, 4096, spec)
        for epilogue in range(3):
            cut = gpu_panels.group(shape, tokens)
            assert isinstance(cut, Group)
            yield gpu_panels.kernel_of(shape, cut, bool(epilogue % 2), epilogue)


def in_order() -> Iterator[Kernel]:
    """Plans that no table has yet: x in order first, of each number of tokens and both dtypes."""
    for tokens, spec, numbers in (
        (8, "1:16", (16, 1, 4, 1, 2)), (16, "2:4", (8, 1, 1, 3, 3)), (32, "1:8", (16, 2, 1, 1, 3)),
        (64, "1:4", (16, 1, 1, 4, 3)), (64, "1:32", (4, 1, 1, 1, 3)),
    ):  # fmt: skip
        for half in (False, True):
            shape = Shape.of(28672, 8192, spec)
            plan = gpu_plan.make(shape, half, tokens, Card(), *numbers, kind="ready")
            assert plan is not None
            yield from of(plan, half)


def test_some_of_each_kind() -> None:
    plans = [gpu_cuts.plan(Shape.of(768, 3072, "1:8"), True, n, Card(), True) for n in (1, 16)]
    assert all(plans)
    assert compile_all((kernel for plan in plans for kernel in of(plan, True)), 90) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_every_pattern_for_an_h100(spec: str) -> None:
    assert compile_all(taken(spec, CARDS[90]), 90) > 10


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["1:8", "2:4", "1:32", "1:16@16"])
@pytest.mark.parametrize("architecture", [80, 100, 120])
def test_other_cards(spec: str, architecture: int) -> None:
    """No warp groups, less shared memory: other cuts of the same kernels."""
    kernels = list(taken(spec, CARDS[architecture]))
    assert not [kernel for kernel in kernels if dict(kernel.constants).get("GROUPS")]
    assert compile_all(iter(kernels), architecture) > 8


@pytest.mark.slow
def test_panels_and_plans_that_no_table_has() -> None:
    assert compile_all(of_many_tokens(), 90) == 2 + 9
    assert compile_all(in_order(), 90) >= 10 + 4


def test_what_a_plan_launches_fits_a_card() -> None:
    """Threads, shared memory and grids of every product that is asked for, on every card."""
    for card in CARDS.values():
        for spec in SPECS:
            for layer in (*LAYERS, (1, 256), (200_000, 512), (256, 131_072)):
                shape = Shape.of(*layer, spec)
                for int8 in (False, True):
                    for tokens in (1, 3, 8, 9, 16, 33, 64, 65, 256):
                        plan = gpu_cuts.plan(shape, False, tokens, card, int8)
                        if plan is None:
                            continue
                        assert plan.threads <= 512
                        assert plan.shared <= card.shared
                        assert 0 < plan.grid[0] < 2**31
                        assert 0 < plan.grid[1] < 65_536
                        assert 0 < plan.grid[2] < 65_536
                        assert plan.shares * tokens * shape.out * 4 < 2**33
    assert torch.iinfo(torch.int32).max > 200_000 * 512
