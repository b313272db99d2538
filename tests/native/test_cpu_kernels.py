"""The compiled kernels against float64 on the masked dense weights, and against hostile buffers."""

import ctypes
import itertools
import mmap
from typing import NamedTuple

import pytest
import torch

from nmflow import native
from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import Call, cpu, unpack
from nmflow.kernels.layout import (
    Shape,
    canonical_from_dense,
    canonical_from_tiled,
    check_canonical,
    tiled_from_canonical,
)
from nmflow.kernels.reference import apply_epilogue
from nmflow.pattern import Pattern

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

# |error| <= tolerance * (|x| @ |W|.T + |b|): half a unit in the last place of the result's dtype,
# and for fp32 the rounding of a few hundred additions.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
PATTERNS = [
    *("2:4", "1:4", "1:8", "1:16", "1:32", "1:1", "1:2", "3:4", "2:8", "3:5", "2:7", "5:17"),
    *("4:32", "1:64", "3:96", "1:128", "16:256", "256:256"),
    *("2:4@16", "1:16@64", "3:10@32", "2:20@48", "1:4@5", "1:8@4", "1:16@2", "3:4@8"),
]
KERNELS = cpu.KERNELS
EPILOGUES = ("none", "gelu", "relu", "silu", "gelu_tanh")
NO_KERNEL = -8


class Packed(NamedTuple):
    """A tiled weight."""

    values: torch.Tensor
    codes: torch.Tensor
    shape: Shape


def pack(w: torch.Tensor, pattern: Pattern) -> Packed:
    shape = Shape.of(w.shape[0], w.shape[1], pattern)
    return Packed(*tiled_from_canonical(*canonical_from_dense(w, shape), shape), shape)


def dense(p: Packed) -> torch.Tensor:
    s = p.shape
    return unpack(p.values, p.codes, (s.out, s.inputs, s.n, s.m, s.panel))


def attempt(x, packed, bias=None, epilogue="none", kernel="auto", threads=1):
    """The product by one kernel; None where it does not serve this case on this machine."""
    struct, out = cpu.PackedStruct.of(*packed), packed.shape.out
    y = torch.empty(x.shape[0], out, dtype=x.dtype)
    status = cpu.lib().nmflow_matmul(
        *(ctypes.byref(struct), x.data_ptr(), packed.shape.inputs),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), out, x.shape[0]),
        *(EPILOGUES.index(epilogue), threads, KERNELS.index(kernel)),
    )
    assert status in (0, NO_KERNEL)
    return None if status else y


def product(x, packed, bias=None, kernel="auto", threads=1) -> torch.Tensor:
    y = attempt(x, packed, bias, kernel=kernel, threads=threads)
    assert y is not None
    return y


@pytest.fixture(params=native.ISAS[:3])  # tiles: test_tiles.py
def isa(request):
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa(before)


def sparse(out: int, inputs: int, pattern: Pattern, dtype: torch.dtype) -> torch.Tensor:
    """A random weight that holds the pattern, by torch alone."""
    w = torch.randn(out, inputs)
    kept = torch.zeros(out, inputs, dtype=torch.bool)
    for row in range(0, out, pattern.panel):
        score = torch.rand(inputs // pattern.m, pattern.m)
        groups = torch.zeros_like(score, dtype=torch.bool)
        groups.scatter_(1, score.topk(pattern.n, 1).indices, True)
        kept[row : row + pattern.panel] = groups.reshape(-1)
    return (w * kept).to(dtype)


def check(y, x, w, bias, epilogue, dtype):
    wide, wide_w, wide_b = x.double(), w.double(), bias.double()
    expected = wide @ wide_w.T + wide_b
    scale = wide.abs() @ wide_w.abs().T + wide_b.abs() + 1e-30
    expected = apply_epilogue(expected, EPILOGUES.index(epilogue))
    assert y.dtype == dtype
    assert float(((y.double() - expected).abs() / scale).max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("epilogue", EPILOGUES[1:])
def test_epilogues_of_every_size(isa, epilogue):
    """Against torch in float64, from subnormal numbers to what overflows, and past every number."""
    packed = pack(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), Pattern("1:4"))
    sizes = torch.cat([torch.logspace(-45, 38, 400), torch.linspace(0, 110, 1999)])
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    x = torch.zeros(2 * len(sizes) + len(special), 4)
    x[:, 0] = torch.cat([sizes, -sizes, special])
    y = attempt(x, packed, epilogue=epilogue)
    assert y is not None
    y = y[:, 0].double()
    want = apply_epilogue(x[:, 0].double(), EPILOGUES.index(epilogue))
    assert y[-1].isnan()
    assert y[-3] == float("inf")
    finite = x[:, 0].isfinite()
    error = (y - want).abs()[finite] / x[finite, 0].double().abs().clamp_min(1e-3)
    assert float(error.max()) < 5e-7


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", PATTERNS)
def test_products(isa, spec, dtype):
    torch.manual_seed(0)
    pattern, served = Pattern(spec), set()
    few = 40 // pattern.m + 1
    for (out, groups), kernel in itertools.product([(1, 1), (37, 3), (100, few), (64, 8)], KERNELS):
        inputs = groups * pattern.m
        w, bias = sparse(out, inputs, pattern, dtype), torch.randn(out).to(dtype)
        packed = pack(w, pattern)
        for tokens, epilogue in [
            *((1, "none"), (2, "gelu"), (3, "silu"), (7, "relu"), (16, "gelu_tanh"), (17, "gelu")),
            *((33, "none"), (47, "relu"), (53, "silu"), (130, "gelu_tanh")),
        ]:
            x = torch.randn(tokens, inputs).to(dtype)
            y = attempt(x, packed, bias, epilogue, kernel)
            if y is None:
                break
            served.add(kernel)
            check(y, x, w, bias, epilogue, dtype)
    assert {"auto", "gather", "tokens"} <= served
    assert ("panel" in served) == (pattern.panel in (2, 4, 8) or pattern.panel % 16 == 0)
    halves = "avx512_bf16" in native.features() and isa == "avx512" and dtype == torch.bfloat16
    assert ("tiles" in served) == (halves and pattern.panel % 16 == 0)
    if isa != "portable":
        assert ("permute" in served) == (pattern.m <= 32 and pattern.panel % 16 != 0)


@pytest.mark.parametrize("spec", ["2:4", "1:16", "16:256", "1:16@64"])
def test_threads_change_no_bit(isa, spec):
    torch.manual_seed(1)
    packed = pack(sparse(300, 1024, Pattern(spec), torch.float32), Pattern(spec))
    for tokens in (1, 20, 197):
        x = torch.randn(tokens, 1024)
        one = product(x, packed, threads=1)
        assert torch.equal(one, product(x, packed, threads=2))


def test_the_own_pool_of_threads(isa):
    """Without torch's OpenMP runtime the library's pool gives the same results."""
    torch.manual_seed(1)
    packed = pack(sparse(500, 1024, Pattern("1:4"), torch.float32), Pattern("1:4"))
    x = torch.randn(197, 1024)
    expected = product(x, packed, threads=1)
    native.library().nmflow_set_runner(None)
    try:
        for threads in (2, 3, 8, 2):
            assert torch.equal(product(x, packed, threads=threads), expected)
    finally:
        native._share_threads(native.library())


def test_kept_bits_survive():
    w = torch.tensor([[-0.0, 3.0, 0.0, 0.0], [0.0, -0.0, -0.0, float("nan")]])
    w[1, 3] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)[0]
    back = dense(pack(w, Pattern("2:4")))
    # The free place is the lowest one, here -0.0, and a NaN keeps its payload.
    assert back.view(torch.int32)[0].tolist() == w.view(torch.int32)[0].tolist()
    assert back.view(torch.int32)[1, 3] == 0x7FC12345
    # A place that is not kept comes back as +0.0.
    assert torch.signbit(back[1]).tolist() == [False, False, False, False]


def test_bytes_of_a_packed_weight():
    for (out, inputs), (dtype, limit) in itertools.product(
        [(3072, 768), (768, 3072)], [(torch.float32, 0.075), (torch.bfloat16, 0.08)]
    ):
        packed = pack(sparse(out, inputs, Pattern("1:16"), dtype), Pattern("1:16"))
        size = packed.values.nbytes + packed.codes.nbytes
        assert size <= limit * out * inputs * dtype.itemsize


@pytest.mark.parametrize("spec", ["2:4", "1:16", "16:256", "1:8@16"])
def test_pruned_inputs_are_not_multiplied(isa, spec):
    """An infinity at an input that no row keeps stays out of the result."""
    pattern = Pattern(spec)
    last = pattern.m - 1
    w = sparse(20, pattern.m * 3, pattern, torch.float32)
    w[:, last] = 0  # groups with too few are filled from the lowest column, so never here
    packed = pack(w, pattern)
    x = torch.randn(40, w.shape[1])
    x[:, last] = float("inf")
    for kernel in ("auto", "gather", "tokens"):
        assert bool(product(x, packed, kernel=kernel).isfinite().all())


@pytest.mark.parametrize("spec", ["2:4", "3:5", "1:16", "1:32", "4:100", "1:4@16"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides_and_neighbours(isa, spec, dtype):
    """x and y with row strides and odd offsets; nothing beside y's rows is written."""
    torch.manual_seed(3)
    pattern = Pattern(spec)
    inputs, out = pattern.m * 7, 45
    w = sparse(out, inputs, pattern, dtype)
    packed = pack(w, pattern)
    run = cpu.bind(*packed)
    for tokens in (1, 5, 40, 70):
        x = torch.randn(tokens, inputs + 3).to(dtype)[:, 1 : inputs + 1]
        wide = torch.full((tokens, out + 6), 77.0, dtype=dtype)
        y = wide[:, 3 : out + 3]
        run(x, None, y, tokens, 0)
        check(y, x, w, torch.zeros(out), "none", dtype)
        assert bool((wide[:, :3] == 77).all())
        assert bool((wide[:, out + 3 :] == 77).all())


class Fenced:
    """A copy of a tensor that ends where a page without access begins."""

    def __init__(self, tensor: torch.Tensor) -> None:
        page = mmap.PAGESIZE
        size = -(-max(tensor.nbytes, 1) // page) * page
        self.memory = mmap.mmap(-1, size + page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(page), 0) == 0
        self.start = size - tensor.nbytes
        self.address = base + self.start
        ctypes.memmove(self.address, tensor.data_ptr(), tensor.nbytes)

    def bytes(self, count: int) -> bytes:
        return bytes(self.memory[self.start : self.start + count])


@pytest.mark.parametrize("spec", ["2:4", "3:5", "1:16", "5:17", "1:32", "1:128", "1:16@16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hostile", [False, True], ids=["right", "hostile"])
def test_no_byte_past_the_end(isa, spec, dtype, hostile):
    """Every buffer ends at a page without access; with hostile codes too nothing is read there."""
    torch.manual_seed(4)
    pattern = Pattern(spec)
    lib = cpu.lib()
    inputs, out = pattern.m * 3, 35
    packed = pack(sparse(out, inputs, pattern, dtype), pattern)
    codes = packed.codes.clone()
    if hostile:
        codes.view(torch.uint8).random_(0, 256)
    values, coded = Fenced(packed.values), Fenced(codes)
    struct = cpu.PackedStruct.of(*packed)
    struct.values, struct.codes = values.address, coded.address
    for tokens, kernel in itertools.product((1, 3, 8, 16, 70), range(1, 6)):
        x = torch.randn(tokens, inputs).to(dtype)
        bias = torch.randn(out).to(dtype)
        a, b, y = Fenced(x), Fenced(bias), Fenced(torch.zeros(tokens, out, dtype=dtype))
        status = lib.nmflow_matmul(
            *(
                ctypes.byref(struct),
                a.address,
                inputs,
                b.address,
                y.address,
                out,
                tokens,
                0,
                1,
                kernel,
            )
        )
        assert status in (0, NO_KERNEL)
        if status == 0 and not hostile:
            held = bytearray(y.bytes(tokens * out * dtype.itemsize))
            got = torch.frombuffer(held, dtype=dtype).view(tokens, out)
            assert torch.allclose(got, product(x, packed, bias), rtol=1e-2, atol=1e-2)


def is_right(packed: Packed) -> bool:
    """By plain torch: its codes are columns of the pattern, and it tiles to the very same codes."""
    values, index = canonical_from_tiled(packed.values, packed.codes, packed.shape)
    try:
        check_canonical(values, index, packed.shape)
    except CompressError:
        return False
    return torch.equal(tiled_from_canonical(values, index, packed.shape)[1], packed.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_refused_where_plain_torch_refuses_them(dtype):
    generator = torch.Generator().manual_seed(5)
    verdicts = {True: 0, False: 0}
    for spec, rows in itertools.product(PATTERNS, (40, 64, 3)):
        pattern = Pattern(spec)
        packed = pack(sparse(rows, pattern.m * 6, pattern, dtype), pattern)
        cpu.validate(*packed)
        size = packed.codes.nbytes
        for at in [*torch.randint(size, (12,), generator=generator).tolist(), size - 1]:
            good = int(packed.codes.view(torch.uint8).flatten()[at])
            for value in (0, 255, good ^ 0x10, good ^ 1):
                codes = packed.codes.clone()
                codes.view(torch.uint8).view(-1)[at] = value
                right = is_right(packed._replace(codes=codes))
                verdicts[right] += 1
                try:
                    cpu.validate(packed.values, codes, packed.shape)
                except FileFormatError:
                    assert not right, (spec, rows, at, value)
                else:
                    assert right, (spec, rows, at, value)
    assert min(verdicts.values()) > 100


def test_values_in_the_padding_are_refused():
    packed = pack(sparse(17, 32, Pattern("1:16"), torch.float32), Pattern("1:16"))
    values = packed.values.clone()
    values.view(-1)[-1] = 1.0
    with pytest.raises(FileFormatError, match="out of range"):
        cpu.validate(values, packed.codes, packed.shape)


def test_wrong_sizes_are_refused():
    values, codes, shape = pack(sparse(8, 16, Pattern("2:4"), torch.float32), Pattern("2:4"))
    for bad in (
        (values[:, :-1], codes),
        (values.repeat(2, 1, 1), codes),
        (values, codes.repeat(2, 1, 1)),
    ):
        with pytest.raises(FileFormatError, match="another size"):
            cpu.validate(*bad, shape)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"n": 0}, -1),
        ({"n": 5}, -1),
        ({"m": 257, "in": 257}, -1),
        ({"in": 18}, -1),
        ({"panel": 0}, -1),
        ({"out": 0}, -2),
        ({"out": -1}, -2),
        ({"out": 2**62}, -2),
        ({"in": 2**40}, -2),
        ({"out": 2**40, "in": 2**26}, -2),
        ({"dtype": 3}, -3),
    ],
)
def test_the_boundary_refuses_shapes(change, status):
    numbers = {"out": 8, "in": 16, "n": 2, "m": 4, "panel": 1, "dtype": 0} | change
    shape = cpu.ShapeStruct(*numbers.values())
    assert cpu.lib().nmflow_choose(ctypes.byref(shape), 1) == status
    packed = cpu.PackedStruct(shape, 64, 64, 64, 64)
    assert cpu.lib().nmflow_validate(ctypes.byref(packed)) == status


def test_the_boundary_refuses_calls():
    lib = cpu.lib()
    packed = pack(sparse(8, 16, Pattern("2:4"), torch.float32), Pattern("2:4"))
    weight = cpu.PackedStruct.of(*packed)
    struct = ctypes.byref(weight)
    x, y = torch.zeros(2, 16), torch.zeros(2, 8)
    good = [struct, x.data_ptr(), 16, None, y.data_ptr(), 8, 2, 0, 1, 0]
    assert lib.nmflow_matmul(*good) == 0
    for at, value, status in [
        *((0, None, -4), (1, None, -4), (2, 15, -2), (4, None, -4), (5, 7, -2), (6, -1, -2)),
        *((2, 2**62, -2), (6, 2**60, -2), (7, 5, -3), (9, 5, -8), (9, 4, -8), (9, 99, -8)),
    ]:
        args = list(good)
        args[at] = value
        assert lib.nmflow_matmul(*args) == status, (at, value)


def test_choices_have_names():
    for pattern, name in (("1:16", KERNELS), ("1:16@16", ("panel",))):
        call = Call(Shape.of(64, 64, pattern), torch.float32, "cpu", 1)
        assert cpu.kernel(call).split()[-1] in name
    named = native.library().nmflow_kernel_name
    named.restype = ctypes.c_char_p
    assert [named(i).decode() for i in range(len(KERNELS))] == list(KERNELS)
