"""Kernels on tiles, of AMX, in C++ or by vectors, against torch in double precision."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import nmflow
from nmflow import native
from nmflow.errors import NMFlowError
from nmflow.kernels import Call, calls, cpu, ops
from nmflow.kernels.explain import explain
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.kernels.reference import apply_epilogue
from nmflow.kernels.registry import choose

_REAL = native.available() and "amx_bf16" in native.features()
FEWEST = {"emulated": 4, "amx": 4, "vectors": 17}  # tokens from which they are chosen
TILES = ("emulated", "vectors", *(["amx"] if _REAL else []))


def _use(tiles: str) -> str:
    """Switch to tiles; why they cannot be had, or ""."""
    if not native.available():
        return native.why_not()
    needs = "tiles in C++ need AVX-512 with bfloat16 products, and a compiler that knows AMX"
    if native.emulate_tiles(tiles == "emulated") != (tiles == "emulated"):
        return needs
    isa = "avx512" if tiles == "vectors" else "amx"
    there = native.set_isa(isa) == isa and cpu.kernel(_call("1:16@16", torch.bfloat16, 64))
    return "" if there == f"{isa} tiles" else needs


def _call(pattern: str, dtype: torch.dtype, tokens: int) -> Call:
    return Call(Shape.of(64, 64, pattern), dtype, "cpu", tokens)


@pytest.fixture(params=TILES)
def tiles(request):
    before = native.isa() if native.available() else ""
    why = _use(request.param)
    if why:
        pytest.skip(why)
    yield request.param
    native.emulate_tiles(False)
    native.set_isa(before)


@pytest.fixture
def emulated():
    before = native.isa() if native.available() else ""
    why = _use("emulated")
    if why:
        pytest.skip(why)
    yield
    native.emulate_tiles(False)
    native.set_isa(before)


# the emulation


def _dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b by the library; a `(rows, pairs, 2)`, b `(pairs, columns, 2)` as bits of bfloat16."""
    out = c.astype(np.float32).copy()
    rows, pairs, columns = a.shape[0], a.shape[1], b.shape[1]
    a, b = np.ascontiguousarray(a, np.uint16), np.ascontiguousarray(b, np.uint16)
    status = native.library().nmflow_emulated_dot(
        rows, pairs, columns, *(x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, out))
    )
    assert status == 0
    return out


def _flushed(x: np.ndarray) -> np.ndarray:
    """Float32 with subnormal numbers as zeros of their sign."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _model(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The same as documented, element by element. Double precision holds a product and its sum with
    a float32 exactly where their exponents are near, so one rounding is that of a fused operation.
    """
    wide = (np.asarray(x, np.uint32) << 16 for x in (a, b))
    a, b = (_flushed(x.view(np.float32)).astype(np.float64) for x in wide)
    sums = np.zeros((a.shape[0], b.shape[1], 2), np.float32)
    for k in range(a.shape[1]):
        product = a[:, k, None, :] * b[k, None, :, :]
        sums = _flushed((sums.astype(np.float64) + product).astype(np.float32))
    both = _flushed(sums[..., 0] + sums[..., 1])
    return _flushed(_flushed(c) + both)


def _bits(x: npt.ArrayLike) -> np.ndarray:
    """The upper half of float32: bfloat16 by cutting."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("rows", "pairs", "columns"), [(16, 16, 16), (1, 1, 1), (16, 8, 16), (5, 3, 11)]
)
def test_a_dot_product_is_that_of_the_documented_one_to_the_bit(rows, pairs, columns):
    random = np.random.default_rng(rows)
    for scale in (1.0, 1e-19, 1e18):  # products that are subnormal, and sums that are near infinity
        a = _bits(random.standard_normal((rows, pairs, 2)) * scale)
        b = _bits(random.standard_normal((pairs, columns, 2)) * scale)
        c = (random.standard_normal((rows, columns)) * scale**2).astype(np.float32)
        assert np.array_equal(_dot(a, b, c).view(np.uint32), _model(a, b, c).view(np.uint32))


@pytest.mark.usefixtures("emulated")
def test_the_order_of_sums_is_even_and_odd_places_apart():
    """1 is lost beside 2^24 in its own chain, and not in the other."""
    big, one = _bits([2.0**12])[0], _bits([1.0])[0]
    a = np.zeros((1, 2, 2), np.uint16)
    b = np.zeros((2, 1, 2), np.uint16)
    a[0, :, 0] = b[:, 0, 0] = (big, one)  # both even: 2^24 + 1 is 2^24
    assert _dot(a, b, np.zeros((1, 1)))[0, 0] == 2.0**24
    a[0, 0, 1] = b[0, 0, 1] = one  # one more in the odd chain: 2^24 + 1 again
    assert _dot(a, b, np.zeros((1, 1)))[0, 0] == 2.0**24
    a[0, 1, 1] = b[1, 0, 1] = one  # two of them are added up first
    assert _dot(a, b, np.zeros((1, 1)))[0, 0] == 2.0**24 + 2


@pytest.mark.usefixtures("emulated")
def test_numbers_that_are_none_and_subnormal_ones():
    inf, nan, tiny = np.float32("inf"), np.float32("nan"), np.float32(2.0**-130)
    for x, y, c, want in [
        (inf, 1.0, 0.0, inf), (inf, -1.0, 0.0, -inf), (inf, 0.0, 0.0, nan), (nan, 1.0, 0.0, nan),
        (inf, 1.0, -inf, nan), (3e38, 3e38, 0.0, inf), (tiny, 2.0**100, 0.0, 0.0),
        (2.0**-100, 2.0**-30, 0.0, 0.0), (1.0, 0.0, tiny, 0.0),
        (2.0**-60, 2.0**-60, 0.0, 2.0**-120),
    ]:  # fmt: skip
        a, b = np.zeros((1, 1, 2), np.uint16), np.zeros((1, 1, 2), np.uint16)
        a[0, 0, 0], b[0, 0, 0] = _bits([x])[0], _bits([y])[0]
        with np.errstate(over="ignore", invalid="ignore"):
            got = _dot(a, b, np.full((1, 1), c, np.float32))[0, 0]
            assert np.array_equal(got, np.float32(want), equal_nan=True), (x, y, c)


# products

# Panels of one tile and of two, laid step by step; of more, laid whole; odd numbers of tiles; more
# than one step, and less; an odd number of entries; last panels and tiles that are smaller.
PATTERNS = ("1:8@16", "1:16@16", "3:10@16", "2:4@32", "1:16@32", "3:10@48", "1:4@64", "2:20@80")
ALL = (1, 3, 4, 15, 16, 31, 32, 33, 63, 64, 65, 97, 128, 130)
SIZES = {(37, 3): ALL, (1, 1): (33,), (64, 16): (64, 128), (100, 9): (130,), (200, 33): (20, 300)}


def _packed(out: int, inputs: int, pattern: str):
    w = torch.randn(out, inputs)
    w = (w * nmflow.mask(w, pattern)).bfloat16()
    shape = Shape.of(out, inputs, pattern)
    return w, cpu.bind(*_held(w, shape), shape), shape


_KEEP: list[torch.Tensor] = []


def _held(w: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """The buffers, which have to outlive what is bound to them."""
    _KEEP[:] = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
    return _KEEP[0], _KEEP[1]


def _laid(x: torch.Tensor, turned: bool) -> torch.Tensor:
    return x.t().contiguous().t() if turned else x


def _near(
    y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, epilogue: int
) -> None:
    """Half a unit in the last place of bfloat16, of the sum of magnitudes."""
    x, w, bias = x.double(), w.double(), bias.double()
    want = apply_epilogue(x @ w.t() + bias, epilogue)
    scale = x.abs() @ w.abs().t() + bias.abs() + 1e-30
    assert float(((y.double() - want).abs() / scale).max()) <= 2.0**-8


@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_in_every_order_are_those_of_the_dense_weight(tiles, pattern):
    for (out, groups), tokens in ((size, t) for size, many in SIZES.items() for t in many):
        w, run, shape = _packed(out, groups * nmflow.Pattern(pattern).m, pattern)
        x, bias = torch.randn(tokens, shape.inputs).bfloat16(), torch.randn(out).bfloat16()
        found = torch.empty(tokens, out, dtype=torch.bfloat16)
        run(x, bias, found, tokens, 0, cpu.KERNELS.index("tiles"))
        _near(found, x, w, bias, 0)
        if tokens < FEWEST[tiles]:
            continue
        for orders, threads in itertools.product(
            itertools.product((False, True), repeat=2), (1, 2)
        ):
            torch.set_num_threads(threads)
            y = _laid(torch.full((tokens, out), float("nan"), dtype=torch.bfloat16), orders[1])
            assert run.turned(_laid(x, orders[0]), bias, y, tokens, 0)
            assert torch.equal(y, found), (shape, tokens, orders, threads)


@pytest.mark.parametrize("epilogue", range(5))
def test_epilogues_biases_and_strides(tiles, epilogue):
    """Of rows and columns of larger tensors, and past the caches, where y is long."""
    cases = [("1:8@16", 96, 70), ("1:8@32", 64, 70)]
    for pattern, out, tokens in [*cases, ("1:16@16", 1024, 1100)] if epilogue < 2 else cases:
        w, run, _ = _packed(out, 64, pattern)
        bias, none = torch.randn(out).bfloat16(), torch.zeros(out)
        for turned, wider in itertools.product((0, 1, 2, 3), (0, 5, 64)):
            x = torch.randn(
                *((64, tokens + wider) if turned & 1 else (tokens, 64 + wider))
            ).bfloat16()
            y = torch.full(
                (out, tokens + wider) if turned & 2 else (tokens, out + wider), 7.0
            ).bfloat16()
            x_own = x[:, :tokens].t() if turned & 1 else x[:, :64]
            y_own = y[:, :tokens].t() if turned & 2 else y[:, :out]
            for b in (bias, None):
                assert run.turned(x_own, b, y_own, tokens, epilogue)
                _near(y_own, x_own, w, none if b is None else b, epilogue)
            assert bool((y[:, tokens if turned & 2 else out :] == 7).all())  # nothing beside it


def test_what_no_row_keeps_is_not_multiplied_and_subnormal_numbers_are_none(tiles):
    w, run, _ = _packed(32, 64, "1:8@16")
    x = torch.randn(40, 64).bfloat16()
    x[:, ~w.any(0)] = float("inf")
    y = torch.empty(40, 32, dtype=torch.bfloat16)
    assert run.turned(x, None, y, 40, 0)
    assert bool(y.isfinite().all()) == bool((~w.any(0)).any())
    x = torch.full((40, 64), 2.0**-130, dtype=torch.bfloat16)
    assert run.turned(x, None, y, 40, 0)
    assert not y.any()


def test_a_large_weight_is_cut_so_that_its_share_stays_in_the_cache(tiles):
    """Values of more than a megabyte, by two threads and more blocks of tokens than one."""
    w, run, _ = _packed(1040, 2048, "1:4@16")
    x, y = torch.randn(300, 2048).bfloat16(), torch.empty(300, 1040, dtype=torch.bfloat16)
    torch.set_num_threads(2)
    run(x, None, y, 300, 0)
    _near(y, x, w, torch.zeros(1040), 0)
    again = torch.empty(1040, 300, dtype=torch.bfloat16).t()
    torch.set_num_threads(1)
    assert run.turned(x, None, again, 300, 0)
    assert torch.equal(again, y)


def test_what_is_refused(tiles):
    _, run, shape = _packed(32, 64, "1:8@16")
    x, y = torch.randn(40, 64).bfloat16(), torch.empty(40, 32, dtype=torch.bfloat16)
    assert not run.turned(x[:3], None, y[:3], 3, 0)  # other kernels are faster
    assert not run.turned(torch.randn(40, 64, 2).bfloat16()[..., 0], None, y, 40, 0)
    packed = ctypes.byref(cpu.PackedStruct.of(_KEEP[0], _KEEP[1], shape))
    call = cpu.lib().nmflow_matmul_turned
    good = [packed, x.data_ptr(), 64, None, y.data_ptr(), 32, 40, 0, 0, 1]
    assert call(*good) == 0
    for place, value, status in [
        (2, 63, -2), (5, 31, -2), (6, -1, -2), (7, 4, -2), (7, -1, -2), (8, 9, -3),
        (1, None, -4), (4, None, -4),
    ]:  # fmt: skip
        assert call(*[value if i == place else given for i, given in enumerate(good)]) == status
    for turned, stride in [(1, 2), (2, 5)]:
        bad = list(good)
        bad[7], bad[stride] = turned, 39
        assert call(*bad) == -2
    before = native.isa()
    native.set_isa("avx2")
    try:
        assert call(*good) == -8
        assert not run.turned(x, None, y, 40, 0)
    finally:
        native.set_isa(before)


# who takes them


def test_the_instruction_set_is_there_or_is_not():
    if not native.available():
        pytest.skip(native.why_not())
    before = native.isa()
    real = "amx_bf16" in native.features()
    try:
        assert (native.set_isa("amx") == "amx") == real
        if native.emulate_tiles(True):
            assert native.set_isa("amx") == "amx"
            assert (
                "amx_bf16" in native.features()
            ) == real  # what the processor has is not emulated
            assert not native.emulate_tiles(False)
            assert (native.isa() == "amx") == real
        with pytest.raises(NMFlowError, match="amx"):
            native.set_isa("amx2")
    finally:
        native.emulate_tiles(False)
        native.set_isa(before)


@pytest.mark.parametrize(
    ("pattern", "dtype", "tokens", "kernel"),
    [
        ("1:16@16", torch.bfloat16, 17, "tiles"),
        ("1:16@16", torch.bfloat16, 3, "panel"),
        ("1:16@16", torch.float32, 64, "panel"),
        ("1:16@8", torch.bfloat16, 64, "panel"),
        ("1:16", torch.bfloat16, 64, "tokens"),
        ("1:16@64", torch.float16, 64, "panel"),
        ("1:8@32", torch.bfloat16, 197, "tiles"),
    ],
)
def test_the_choice_names_what_runs(tiles, pattern, dtype, tokens, kernel):
    isa = native.isa() if kernel == "tiles" else "avx512"
    assert choose(_call(pattern, dtype, tokens)).kernel == f"{isa} {kernel}"
    chosen = [cpu.kernel(_call("1:16@16", torch.bfloat16, t)).split()[1] for t in range(1, 40)]
    assert chosen.index("tiles") == FEWEST[tiles] - 1
    native.set_isa("avx2")
    assert "tiles" not in choose(_call(pattern, dtype, tokens)).kernel


def _network(pattern: str) -> nn.Module:
    layers = nn.Linear(64, 96), nn.Linear(96, 64)
    for layer in layers:
        layer.weight.data *= nmflow.mask(layer.weight, pattern)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


@pytest.mark.parametrize("pattern", ["1:8@16", "1:16@32"])
def test_networks_take_tiles_in_bfloat16_and_only_so(tiles, pattern):
    x = torch.randn(2, 20, 64)
    network = _network(pattern)
    said = {}
    for name, model, dtype in [
        ("float32", network, None),
        ("rounded", network, "bfloat16"),
        ("bfloat16", _network(pattern).bfloat16(), None),
    ]:
        packed = nmflow.compress(model, pattern, measure=False, dtype=dtype)
        given = x.bfloat16() if name == "bfloat16" else x
        said[name] = {choice.kernel for _, choice in explain(packed, given)}
        with torch.no_grad():
            torch.testing.assert_close(packed(given), model(given), rtol=2e-2, atol=2e-2)
    on = {f"{native.isa()} tiles"}
    assert said == {"float32": {"avx512 panel"}, "rounded": on, "bfloat16": on}


def test_features_side_by_side_are_taken_as_they_lie(tiles, monkeypatch):
    """In any number of axes that are one in memory, without a copy; others are laid in rows."""
    _packed(48, 64, "1:8@16")
    values, codes = _KEEP
    numbers = (48, 64, 1, 8, 16)
    x = torch.randn(60, 64).bfloat16()
    want = ops.matmul(x, values, codes, None, numbers)
    as_one = x.t().contiguous().t().view(3, 20, 64)
    assert torch.equal(ops.matmul(as_one, values, codes, None, numbers), want.view(3, 20, 48))
    by_batch = x.view(3, 20, 64).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.matmul(by_batch, values, codes, None, numbers), want.view(3, 20, 48))
    monkeypatch.setattr(calls, "rows_of", None)
    y = ops.matmul(x.t().contiguous().t()[None], values, codes, None, numbers)
    assert torch.equal(y[0], want)
    assert y.is_contiguous()


# instructions


def _functions() -> dict[str, list[str]]:
    """The library's functions that use tiles, as lines of assembly."""
    tool, path = shutil.which("objdump"), native.path()
    if tool is None or path is None:
        pytest.skip("objdump is missing" if tool is None else native.why_not())
    text = subprocess.run(
        [tool, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    if "__asan" in text:
        pytest.skip("sanitizers put checks of their own between the instructions")
    found = {}
    for block in re.split(r"\n\n", text):
        name, _, body = block.partition("\n")
        if "tdpbf16ps" in body:
            found[name] = body.splitlines()
    if not found:
        pytest.skip("the library was built by a compiler that does not know AMX")
    return found


def test_loops_on_tiles_are_the_loads_and_products_that_they_should_be():
    """Runs of products: their loads, and no vector that waits in memory between them."""
    runs = []
    for lines in _functions().values():
        at = [i for i, line in enumerate(lines) if re.search(r"\btile(loadd|zero)|tdpbf16ps", line)]
        while at:
            end = next((k for k in range(1, len(at)) if at[k] - at[k - 1] > 6), len(at))
            part = lines[at[0] : at[end - 1] + 1]
            at = at[end:]
            if any("tdpbf16ps" in line for line in part):
                runs.append(part)
    shapes = set()
    for part in runs:
        products = sum("tdpbf16ps" in line for line in part)
        loads = sum("tileloadd" in line for line in part)
        shapes.add((products, loads))
        assert not any(re.search(r"[xyz]mm\d", line) and "(%r" in line for line in part), part
    # 16 rows by 64 tokens, 32 by 32, and 16 by 32.
    assert {(4, 5), (4, 4), (2, 3)} <= shapes


@pytest.mark.slow
def test_the_benchmark_runs_here_in_small_and_refuses_where_there_is_no_amx():
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "benchmarks/amx.py", "--seconds", "0.01"]
    small = subprocess.run([*command, "--rehearse"], cwd=root, capture_output=True, text=True)
    assert small.returncode == 0, small.stderr
    assert "1:16@32 by features" in small.stdout
    if not _REAL:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.strip().startswith("benchmarks/amx.py needs a processor with AMX")
