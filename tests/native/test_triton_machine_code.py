"""The Triton kernels compiled for cards, without one: what Triton's interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = Path(__file__).parents[1] / "support/compiled_for_card.py"
# Bytes that a block of a card may share, by its capability.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
PRODUCTS = {"panels", "weight_grad", "entry_sums", "mend"}
# Words of a thread that may be in local memory: of loops that have a step or two at most.
MOST_LOCAL = 64


def compiled(capability: int, *parts: str) -> list[dict[str, Any]]:
    """Each kernel that the parts launch, as it is compiled in a process without interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), str(capability), *parts]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    for one in found:
        assert one["shared"] <= SHARED[capability], one
        assert one["threads"] <= 1024, one
        assert one["local"] <= MOST_LOCAL, one
        assert bool(one["products"]) == (one["kernel"] in PRODUCTS), one
    return found


def test_some_kernels_compile() -> None:
    names = [one["kernel"] for one in compiled(90, "sample")]
    assert sorted(names) == ["entry_sums", "input_grad", "list_entries", "mend", "pack"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("part", ["steps", "panels", "masks", "many", "prints"])
def test_every_kernel_compiles(part: str, capability: int) -> None:
    """Every dtype, every option, numbers that Triton makes constants: within what a card has."""
    found = compiled(capability, part)
    assert len(found) > 5
    for one in found:
        if one.get("ALIGNED") and one.get("AXIS", 1) == 1:
            assert {"ld.global.v4", "st.global.v4"} <= set(one["wide"]), one


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 120])
def test_layers_of_networks_compile(capability: int) -> None:
    """On a card of consumers too, whose blocks share half as much; by warp groups on an H100."""
    found = compiled(capability, "layers")
    assert {one["kernel"] for one in found} == PRODUCTS | {
        "pack", "list_entries", "input_grad", "spread",
    }  # fmt: skip
    assert all("ld.global.v4" in one["wide"] for one in found if one["kernel"] == "input_grad")
    if capability == 90:
        fast = [one for one in found if one["kernel"] == "weight_grad" and one["threads"] == 256]
        assert fast
        assert {one["products"] for one in fast} == {"wgmma.mma_async"}
        assert all("cp.async" in one["wide"] for one in fast)
