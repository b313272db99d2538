"""Training on panels: on a GPU where there is one, else its kernels in Triton's interpreter."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

import nmflow
from nmflow import mask
from nmflow.errors import CompressError
from nmflow.kernels import gpu_driver, gpu_steps, kept_linear
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.masks import triton as masks_triton
from nmflow.masks.kept_values import to_bits

THERE = torch.cuda.is_available()
if not THERE and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DEVICE = "cuda" if THERE else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float16, torch.bfloat16] if THERE else [torch.float16]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-16}
needs_gpu = pytest.mark.skipif(not THERE, reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def _as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    if not THERE:
        monkeypatch.setattr(gpu_driver, "why_not", lambda: None)


def drawn(spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """A shape, its mask, a float32 weight that holds it, x, dy and a bias."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(out, inputs, generator=draw)
    x, dy = (torch.randn(tokens, n, generator=draw).to(dtype) for n in (inputs, out))
    kept, bias = mask(w, spec), torch.randn(out, generator=draw)
    return Shape.of(out, inputs, spec), *(t.to(DEVICE) for t in (kept, w * kept, x, dy, bias))


def near(found: Tensor, want: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Within a rounding of two steps of the sum of what was added."""
    assert found.dtype == dtype
    wrong = (found.double() - want).abs() > TOLERANCE[dtype] * size + 1e-6
    assert not wrong.any(), int(wrong.sum())


def check_products(
    spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype, wide: torch.dtype,
    case: str = "",
) -> None:  # fmt: skip
    """All three products of a weight, against float64."""
    shape, kept, w, x, dy, bias = drawn(spec, out, inputs, tokens, dtype)
    if case == "held":  # kept places that are 0, which only a mask tells
        w[: out // 2] = 0
        w[:, : inputs // 3] = 0
    if case == "more":  # than N in a group
        w[3, : shape.n + 2], kept = 1.0, torch.ones_like(kept)
    w = w.to(wide)
    bits = to_bits(kept) if case == "held" else None
    values, codes, fits = gpu_steps.pack(w, bits, shape, dtype)
    assert int(fits) == (case != "more")
    rounded = w.to(dtype)
    if not case:
        for one, other in zip(
            (values, codes), tiled_from_canonical(*canonical_from_dense(rounded, shape), shape),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(one, other)
    y = gpu_steps.forward(x, w, values, codes, fits, bias, shape)
    dx = gpu_steps.input_grad(dy, w, values, codes, fits, shape)
    dw = gpu_steps.weight_grad(x, dy, codes, fits, shape, wide)
    a, b, d, c = (t.double() for t in (x, rounded, dy, bias.to(dtype)))
    near(y, a @ b.t() + c, a.abs() @ b.t().abs() + c.abs(), dtype)
    near(dx, d @ b, d.abs() @ b.abs(), dtype)
    near(dw, kept * (d.t() @ a), d.t().abs() @ a.abs(), wide)
    assert not dw[~kept].any()


# Tails of rows, of entries, of tokens; an odd number of entries; spans of many groups and of one.
QUICK = [
    ("1:16@64", 150, 272, 70, ""),
    ("1:8@128", 200, 136, 300, ""),
    ("2:32@64", 70, 320, 33, "held"),
    ("1:16@64", 128, 64, 40, "more"),
    ("1:12@192", 192, 144, 16, ""),
]
MORE = [
    ("1:4@64", 64, 88, 17, ""),
    ("3:16@64", 130, 48, 5, "held"),
    ("1:256@64", 64, 768, 20, ""),
    ("1:16@256", 512, 512, 200, "more"),
    ("4:64@128", 384, 256, 1, ""),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "out", "inputs", "tokens", "case"), QUICK)
def test_three_products(
    spec: str, out: int, inputs: int, tokens: int, case: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where input gradients are added up of shares of the tokens."""
    monkeypatch.setattr(gpu_steps, "SCRATCH", 1 << 17)
    check_products(spec, out, inputs, tokens, dtype, torch.float32, case)


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "out", "inputs", "tokens", "case"), QUICK + MORE)
def test_three_products_of_every_kind(
    spec: str, out: int, inputs: int, tokens: int, case: str, dtype: torch.dtype, wide: str
) -> None:
    kind = torch.float32 if wide == "float32" else dtype
    check_products(spec, out, inputs, tokens, dtype, kind, case)


def test_no_tokens() -> None:
    shape, _, w, x, dy, bias = drawn("1:16@64", 64, 64, 0, torch.float16)
    packed = gpu_steps.pack(w, None, shape, torch.float16)
    assert gpu_steps.forward(x, w, *packed, bias, shape).shape == (0, 64)
    assert gpu_steps.input_grad(dy, w, *packed, shape).shape == (0, 64)
    assert not gpu_steps.weight_grad(x, dy, *packed[1:], shape, torch.float32).any()


def test_sums_are_float32_whatever_torch_makes_by_default() -> None:
    shape, kept, w, x, dy, _ = drawn("1:16@64", 64, 64, 40, torch.float16)
    packed = gpu_steps.pack(w, None, shape, torch.float16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        dw = gpu_steps.weight_grad(x, dy, *packed[1:], shape, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    a, d = x.double(), dy.double()
    near(dw, kept * (d.t() @ a), d.t().abs() @ a.abs(), torch.float32)


@pytest.mark.parametrize("traced", [False, True])
def test_whether_triton_works_does_not_depend_on_who_asks(traced: bool) -> None:
    """Nor on torch's default dtype: what is found out is kept for good."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    masks_triton._why_not.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with FakeTensorMode() if traced else contextlib.nullcontext():
            assert masks_triton.why_not() == ""
    finally:
        torch.set_default_dtype(torch.float32)


class Noted:
    """Has a kernel's launches noted, and none of them run."""

    def __init__(self, kernel: Any, launched: list[Any]) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **more: Any) -> None:
            names = dict(zip(self._kernel.arg_names, args, strict=False)) | more
            self._launched.append((self._kernel.__name__, grid, names))

        return run


@pytest.mark.parametrize("tokens", [1, 63, 65, 4096, 25_216, 1_000_003])
@pytest.mark.parametrize(
    ("spec", "out", "inputs"),
    [
        ("1:16@64", 28672, 8192), ("1:16@128", 11008, 4096), ("1:8@64", 4096, 11008),
        ("1:16@128", 768, 3072), ("1:256@64", 1, 256), ("1:4@64", 65, 4),
        ("16:256@64", 200_000, 256),
    ],
)  # fmt: skip
def test_launches_are_within_what_a_card_takes(
    spec: str, out: int, inputs: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids, numbers of 32 bits, powers of two, products of 16 and more; scratch as was asked."""
    from nmflow.kernels import gpu_panels_kernel, gpu_steps_kernel

    launched: list[Any] = []
    for module in (gpu_panels_kernel, gpu_steps_kernel):
        for name, kernel in list(vars(module).items()):
            if hasattr(kernel, "arg_names"):
                monkeypatch.setattr(module, name, Noted(kernel, launched))
    shape = Shape.of(out, inputs, spec)
    w = torch.empty(out, inputs, device="meta")
    x, dy = (torch.empty(tokens, n, device="meta", dtype=torch.bfloat16) for n in (inputs, out))
    packed = gpu_steps.pack(w, None, shape, torch.bfloat16)
    gpu_steps.forward(x, w, *packed, None, shape)
    gpu_steps.input_grad(dy, w, *packed, shape)
    gpu_steps.weight_grad(x, dy, *packed[1:], shape, torch.float32)
    kinds = {name for name, _, _ in launched}
    assert kinds == {
        "pack", "panels", "mend", "list_entries", "entry_sums", "input_grad", "weight_grad",
        "spread",
    }  # fmt: skip
    assert shape.lists * shape.entries < 2**31  # counted in 32 bits
    for name, grid, args in launched:
        x_blocks, *rest = (*grid, 1, 1)
        assert 0 < x_blocks < 2**31, name
        assert all(0 < blocks < 65_536 for blocks in rest), (name, grid)
        numbers = {key: n for key, n in args.items() if isinstance(n, int)}
        assert all(0 <= n < 2**31 for n in numbers.values()), (name, numbers)
        for key in ("G", "WIDE", "R", "BC", "BL", "BM", "BN", "BV", "BK", "BT"):
            assert numbers.get(key, 1).bit_count() == 1, (name, key)
        if name not in ("pack", "list_entries", "input_grad"):  # products
            sizes = [numbers[key] for key in ("BV", "BK", "BT", "BM", "BN") if key in numbers]
            assert min(sizes) >= 16, name
        if name == "entry_sums":
            sums = args["sums_ptr"]
            assert sums.shape[1] == args["stride"]
            assert args["stride"] % args["BT"] == 0
            least = args["BT"] * shape.lists * shape.entries * 4
            assert sums.nbytes <= max(gpu_steps.SCRATCH, least)


@pytest.mark.parametrize("why", ["the GPU (T4) is sm_75, and", "there is no libnvrtc", "for AMD"])
def test_cards_and_builds_of_torch_without_these_kernels(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton alone is not enough: x is turned, and on sm_90 multiplied, by kernels of NVRTC."""
    monkeypatch.setattr(gpu_driver, "why_not", lambda: why)
    gpu_steps._served.cache_clear()
    try:
        assert gpu_steps.why_not(Shape.of(64, 64, "1:16@64")) == why
        assert gpu_steps._served(64, 64, 1, 16, 64) is None
    finally:
        gpu_steps._served.cache_clear()


@pytest.mark.parametrize("kernel", ["pack", "input_grad", "mend", *([] if THERE else ["panels"])])
def test_a_kernel_that_does_not_compile_is_one_error(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose word says what to do; others than the compilers' go through as they are."""
    from triton.runtime.errors import OutOfResources

    from nmflow.kernels import gpu_panels_kernel, gpu_steps_kernel

    for error, kind in (
        (OutOfResources(300_000, 232_448, "shared memory"), CompressError),
        (subprocess.CalledProcessError(1, ["gcc"]), CompressError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
    ):
        module = gpu_panels_kernel if kernel == "panels" else gpu_steps_kernel
        monkeypatch.setattr(module, kernel, Fails(kernel, error))
        with pytest.raises(kind) as caught:
            check_products("1:16@64", 64, 64, 4, torch.float16, torch.float32)
        if kind is CompressError:
            assert f"'{kernel}'" in str(caught.value)
            assert "sparse_steps='off'" in str(caught.value)


class Fails:
    """Raises an error in place of a kernel's launch."""

    def __init__(self, name: str, error: Exception) -> None:
        self.__name__, self._error = name, error

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **more: Any) -> None:
            raise self._error

        return run


def test_reasons() -> None:
    assert "panels of 64, 128" in gpu_steps.why_not(Shape.of(64, 64, "1:16"))
    assert "panels of 64, 128" in gpu_steps.why_not(Shape.of(64, 64, "1:16@32"))
    assert "more than a quarter" in gpu_steps.why_not(Shape.of(64, 64, "2:4@64"))
    assert not gpu_steps.why_not(Shape.of(64, 64, "1:4@64"))
    half, wide = torch.bfloat16, torch.float32
    assert "called with float32" in gpu_steps.why_not_dtypes(wide, wide)
    assert "bfloat16 on weights of float16" in gpu_steps.why_not_dtypes(half, torch.float16)
    assert not gpu_steps.why_not_dtypes(half, wide)
    assert not gpu_steps.why_not_dtypes(half, half)


def test_the_fake_op_knows_what_the_op_gives() -> None:
    """On a device that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="cuda")
        for spec, kind in (("1:16@64", torch.bfloat16), ("1:16", torch.float32)):
            shape = Shape.of(128, 64, spec)
            w = torch.empty(128, 64, device="cuda")
            numbers = shape.n, shape.m, shape.panel
            y, values, codes, fits = torch.ops.nmflow.kept_linear(x, w, None, None, *numbers)
            assert (y.shape, y.dtype, y.device.type) == ((2, 5, 128), torch.bfloat16, "cuda")
            assert values.dtype == kind
            assert (values.shape, codes.shape) == shape.tiled_sizes(kind)
            assert fits.device.type == ("cuda" if shape.panel > 1 else "cpu")
            found = torch.ops.nmflow.kept_linear_backward(
                y, x, w, values, codes, fits, *numbers, [True, True, True]
            )
            assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_sizes_may_be_symbols() -> None:
    """Those of a compiler that takes any size: they have a number, and no hash."""

    class Symbol:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, number: int) -> None:
            self._number = number

        def __int__(self) -> int:
            return self._number

    like: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    weight: Any = SimpleNamespace(**vars(like), numel=lambda: 8192, shape=(Symbol(128), Symbol(64)))
    assert gpu_steps.served(like, weight, 1, 16, 64) == Shape.of(128, 64, "1:16@64")
    assert gpu_steps.served(like, weight, 1, 16, 1) is None


@pytest.mark.parametrize("case", ["", "more"])
def test_gradients_of_the_op(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU from the op to its second derivatives, here on whatever device there is."""
    shape, kept, w, x, _, bias = drawn("1:16@64", 64, 64, 6, torch.float16)
    monkeypatch.setattr(gpu_steps, "served", lambda x, weight, *numbers: shape)
    if case:
        w[3, :4], kept = 1.0, torch.ones_like(kept)
    given = [t.clone().requires_grad_() for t in (x.view(2, 3, 64), w, bias)]
    other = [t.detach().double().requires_grad_() for t in given]
    y = kept_linear(given[0], given[1], given[2], None, 1, 16, 64)
    want = F.linear(other[0], other[1].half().double(), other[2].half().double())
    dy = torch.randn_like(y)
    one = torch.autograd.grad(y, given, dy, create_graph=True)
    two = torch.autograd.grad(want, other, dy.double(), create_graph=True)
    for a, b, t in zip(one, two, given, strict=True):
        assert a.dtype == t.dtype
        b = b * kept if t is given[1] else b
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=0.02)
    twice = torch.autograd.grad(one[0].float().square().sum(), given[1])[0]
    wanted = torch.autograd.grad(two[0].square().sum(), other[1])[0]
    assert twice.dtype == torch.float32
    torch.testing.assert_close(twice.double(), wanted, rtol=2**-6, atol=0.5)


# --- on a card --------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["1:16@64", "1:8@128", "2:32@64"])
@pytest.mark.parametrize(("out", "inputs"), [(3072, 768), (768, 3072), (1000, 1024)])
@pytest.mark.parametrize("tokens", [197, 4096])
def test_layers_of_networks(
    spec: str, out: int, inputs: int, tokens: int, dtype: torch.dtype
) -> None:
    check_products(spec, out, inputs, tokens, dtype, torch.float32)


@needs_gpu
def test_the_op_is_differentiable_and_compiles() -> None:
    _, kept, w, x, _, bias = drawn("1:16@64", 256, 512, 300, torch.bfloat16)
    x = x.view(3, 100, 512)
    for run in (kept_linear, torch.compile(kept_linear, fullgraph=True)):
        given = [t.clone().requires_grad_() for t in (x, w, bias)]
        other = [t.clone().requires_grad_() for t in (x, w, bias)]
        y = run(given[0], given[1], given[2], None, 1, 16, 64)
        want = F.linear(other[0], other[1].bfloat16(), other[2].bfloat16())
        torch.testing.assert_close(y, want, rtol=2**-6, atol=0.05)
        dy = torch.randn_like(y)
        y.backward(dy)
        want.backward(dy)
        for one, two in zip(given, other, strict=True):
            assert one.grad is not None
            assert two.grad is not None
            assert one.grad.dtype == two.grad.dtype
            wanted = two.grad * kept if one is given[1] else two.grad
            torch.testing.assert_close(one.grad, wanted, rtol=2**-5, atol=0.3)


def _network() -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    return model


@needs_gpu
@pytest.mark.parametrize("auto", [True, False], ids=["autocast", "bfloat16"])
def test_steps_of_a_flow_are_those_of_dense_layers(auto: bool) -> None:
    """Frozen masks; losses within rounding, the same places pruned, and no wait for the device."""
    losses: dict[str, list[float]] = {}
    first = _network() if auto else _network().bfloat16()
    x = torch.randn(512, 256, device="cuda", dtype=torch.float32 if auto else torch.bfloat16)
    pruned = {}
    for mode in ("off", "on"):
        model = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        flow = nmflow.attach(
            model, optimizer, nmflow.OneShot(dense=0), "1:16@64", include="*", total_steps=20,
            freeze_mask=True, sparse_steps=mode,
        )  # fmt: skip
        told = []
        for k in range(8):
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("error" if k > 2 else "default")
            with torch.autocast("cuda", torch.bfloat16, enabled=auto):
                loss = (model(x) - x).float().square().mean()
            loss.backward()
            torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
            told.append(loss.detach())
        losses[mode] = [float(one) for one in told]
        pruned[mode] = model[0].weight == 0
        assert [one.sparse for one in flow.explain().layers] == [mode == "on"] * 2
    for one, two in zip(losses["off"], losses["on"], strict=True):
        assert abs(one - two) <= 0.02 * one
    assert torch.equal(pruned["off"], pruned["on"])


@needs_gpu
def test_why_layers_of_a_flow_are_dense() -> None:
    for spec, dtype, said in (
        ("1:16", torch.bfloat16, "panels of 64, 128"),
        ("1:16@64", torch.float32, "called with float32"),
    ):
        model = _network().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        flow = nmflow.attach(
            model, optimizer, nmflow.OneShot(dense=0), spec, include="*", total_steps=3,
            sparse_steps="on",
        )  # fmt: skip
        model(torch.randn(8, 256, device="cuda", dtype=dtype)).square().mean().backward()
        optimizer.step()
        model(torch.randn(8, 256, device="cuda", dtype=dtype))
        assert all(said in one.why for one in flow.explain().layers)


@needs_gpu
def test_auto_measures_on_the_device() -> None:
    model: Any = nn.Sequential(nn.Linear(4096, 8192)).cuda().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = nmflow.attach(
        model, optimizer, nmflow.OneShot(dense=0), "1:16@128", include="*", total_steps=3,
        sparse_steps="auto",
    )  # fmt: skip
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    (layer,) = flow.explain().layers
    print(layer)
    assert layer.sparse or "× as fast as dense" in layer.why
