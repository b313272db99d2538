"""The compiled library: it loads or says why not; its masks are those of a stable sort."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from nmflow import native
from nmflow.errors import NMFlowError, PatternError, WeightError
from nmflow.masks import native as native_masks

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_not())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [
    *((1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4), (1, 8), (2, 8), (7, 8), (1, 16)),
    *((3, 16), (15, 16), (2, 3), (5, 7), (1, 32), (4, 32), (31, 32), (1, 48), (6, 64), (1, 128)),
    *((16, 256), (100, 200), (200, 256), (8, 2048), (1, 5000)),
]


@pytest.fixture(params=native.ISAS[:3])  # tiles: test_tiles.py
def isa(request):
    if not native.available():
        pytest.skip(native.why_not())
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa(before)


def largest(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The n largest of every m along the last axis, ties to the lowest place: a stable sort."""
    groups = scores.reshape(-1, m)
    first = torch.argsort(groups, dim=1, descending=True, stable=True)[:, :n]
    kept = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, first, True)
    return kept.reshape(scores.shape)


def weights(rows: int, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights with few ties, with many, with nothing else, and with subnormals beside zeros."""
    w = torch.randn(rows, length)
    tiny = torch.finfo(dtype).smallest_normal
    return {
        "normal": w.to(dtype),
        "few values": (w * 2).round().to(dtype),
        "one value": torch.full_like(w, -0.5).to(dtype),
        "zeros": torch.where(w > 0, 0.0, -0.0).to(dtype),
        "subnormal": (torch.randint(-2, 3, w.shape) * (tiny / 4)).to(dtype),
        "mostly equal": torch.where(w > 1.5, w, 1.0).to(dtype),
        "largest": (torch.randint(1, 3, w.shape) * (torch.finfo(dtype).max / 2)).to(dtype),
    }


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_masks_are_those_of_a_stable_sort(isa, n, m, dtype):
    torch.manual_seed(n * 10_000 + m)
    for rows, groups in ((1, 1), (7, 5), (3, 19)):
        for name, w in weights(rows, groups * m, dtype).items():
            dense, out = torch.empty_like(w), torch.empty_like(w)
            mask = torch.empty(w.shape, dtype=torch.bool)
            before = w.clone()
            assert native_masks.project(w, n, m, 0.25, dense, mask, out)
            expected = largest(w.abs().double(), n, m)
            assert torch.equal(mask, expected), name
            assert int(mask.sum()) == rows * groups * n
            faded = (w.float() * torch.where(expected, 1.0, 0.25)).to(dtype)
            assert torch.equal(out, faded), name
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(dense.view(bits), before.view(bits))
            assert torch.equal(w.view(bits), before.view(bits))
            # Each output alone, and in place.
            alone = torch.zeros_like(mask)
            assert native_masks.project(w, n, m, 0.25, mask=alone)
            assert torch.equal(alone, mask)
            other = torch.randn(w.shape).to(dtype)
            scaled = (other.float() * torch.where(expected, 1.0, 0.25)).to(dtype)
            assert native_masks.project(w, n, m, 0.25, out=other, values=other)
            assert torch.equal(other, scaled), name
            pulled = other.double() * 0.5 + w.double() * 0.125  # exact but for the last rounding
            pulled = torch.where(expected, other, pulled.float().to(dtype))
            assert native_masks.project(w, n, m, 0.5, out=other, values=other, pull=0.125)
            assert torch.equal(other, pulled), name
            assert native_masks.project(w, n, m, 0.25, out=w)
            assert torch.equal(w, faded)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_weight_with_heavy_ties(isa, dtype, threads):
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    w = (torch.randn(192, 3072) * 4).round().to(dtype)
    for n, m in ((2, 4), (1, 16), (4, 32), (16, 256)):
        mask = torch.empty(w.shape, dtype=torch.bool)
        assert native_masks.project(w, n, m, 0.0, mask=mask)
        assert torch.equal(mask, largest(w.abs().double(), n, m))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_groups_along_any_axis(isa, dtype, dim):
    torch.manual_seed(0)
    for n, m in ((1, 4), (2, 8), (3, 12)):
        shape = [5, 7, 3]
        shape[dim] = 2 * m
        w = (torch.randn(shape) * 2).round().to(dtype)
        mask = torch.empty(w.shape, dtype=torch.bool)
        assert native_masks.project(w, n, m, 1.0, mask=mask, dim=dim)
        last = w.movedim(dim, -1).contiguous()
        assert torch.equal(mask, largest(last.abs().double(), n, m).movedim(-1, dim))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_share_what_they_keep(isa, dtype):
    torch.manual_seed(0)
    for panel in (2, 5, 16):
        w = (torch.randn(37, 32) * 2).round().to(dtype)
        mask = torch.empty(w.shape, dtype=torch.bool)
        assert native_masks.project(w, 2, 8, 1.0, mask=mask, panel=panel)
        for row in range(0, 37, panel):
            # Small whole numbers: any order of adding them gives the same sums.
            sums = w[row : row + panel].abs().float().sum(0, keepdim=True)
            expected = largest(sums, 2, 8).expand(min(panel, 37 - row), -1)
            assert torch.equal(mask[row : row + panel], expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_told_wherever_it_is(isa, dtype, value):
    torch.manual_seed(0)
    for n, m in ((1, 4), (2, 4), (1, 16), (4, 32), (1, 96), (3, 7), (8, 2048)):
        for place in (0, m - 1, 3 * m + m // 2, 6 * m - 1):
            w = torch.randn(6, m).to(dtype)
            w.view(-1)[place] = value
            before = w.clone()
            mask, out = torch.empty(w.shape, dtype=torch.bool), torch.empty_like(w)
            assert not native_masks.project(w, n, m, 0.5, mask=mask, out=out)
            assert torch.equal(w.nan_to_num(), before.nan_to_num())
        assert native_masks.project(torch.randn(6, m).to(dtype), n, m, 0.5)


@needs_library
def test_wrong_arguments_are_refused():
    w = torch.zeros(4, 8)
    with pytest.raises(PatternError, match="5:4"):
        native_masks.project(w, 5, 4, 0.0)
    with pytest.raises(PatternError, match="1:3"):
        native_masks.project(w, 1, 3, 0.0)
    with pytest.raises(WeightError, match="float64"):
        native_masks.project(w.double(), 1, 4, 0.0)
    with pytest.raises(WeightError, match="out is"):
        native_masks.project(w, 1, 4, 0.0, out=torch.zeros(4, 4))
    with pytest.raises(WeightError, match="mask is"):
        native_masks.project(w, 1, 4, 0.0, mask=torch.zeros(4, 8))
    with pytest.raises(WeightError, match="contiguous"):
        native_masks.project(torch.zeros(8, 4).T, 1, 4, 0.0)
    with pytest.raises(NMFlowError, match="isa is 'sse9'"):
        native.set_isa("sse9")
    assert native_masks.project(torch.zeros(0, 8), 1, 4, 0.0)


# Importing torch takes longer than all else that these processes do, so they are forks of one.
FORKS = """
import json, os, sys
import torch
for environment in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        os.environ.update(environment)
        from nmflow import native
        try:
            native.library()
            error = ""
        except native.NMFlowError as raised:
            error = str(raised)
        told = [native.available(), native.why_not(), error]
        told += [native.isa(), native.features()] if told[0] else ["", ()]
        print(json.dumps(told), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
ENVIRONMENTS = [
    {"NMFLOW_NATIVE": "0"},
    {"NMFLOW_LIBRARY": "/nowhere/lib.so"},
    *({"NMFLOW_ISA": name} for name in native.ISAS),
]


@pytest.fixture(scope="module")
def told() -> list[list[Any]]:
    """What nmflow says of its library in each of the environments."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    command = [sys.executable, "-c", FORKS, json.dumps(ENVIRONMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_can_be_left_out(told):
    left_out, missing, *_ = told
    assert left_out[:2] == [False, "NMFLOW_NATIVE=0 is set"]
    assert "NMFLOW_NATIVE=0" in left_out[2]
    assert not missing[0]
    assert missing[1].startswith("lib.so cannot be loaded")


@needs_library
@pytest.mark.parametrize("name", native.ISAS)
def test_the_environment_caps_the_instruction_set(name, told):
    *_, isa, features = told[2 + native.ISAS.index(name)]
    found = [isa, *features]
    needs = {"amx": "amx_bf16", "avx512": "avx512", "avx2": "avx2"}
    best = next((isa for isa, feature in needs.items() if feature in found[1:]), "portable")
    order = native.ISAS.index
    assert found[0] == native.ISAS[min(order(name), order(best))]
