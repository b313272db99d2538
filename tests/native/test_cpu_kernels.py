"""The compiled kernels against float64 on the masked dense weights, and against hostile buffers."""

import ctypes
import itertools
import mmap

import pytest
import torch

from nmflow import native
from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import cpu, cpu_layout
from nmflow.kernels.layout import Shape
from nmflow.pattern import Pattern

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

# |error| <= tolerance * (|x| @ |W|.T + |b|): half a unit in the last place of the result's dtype,
# and for fp32 the rounding of a few hundred additions.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
PATTERNS = [
    *("2:4", "1:4", "1:8", "1:16", "1:32", "1:1", "1:2", "3:4", "2:8", "3:5", "2:7", "5:17"),
    *("4:32", "1:64", "3:96", "1:128", "16:256", "256:256"),
    *("2:4@16", "1:16@64", "3:10@32", "2:20@48", "1:4@5", "1:8@4"),
]
KERNELS = cpu.KERNELS


@pytest.fixture(params=native.ISAS)
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
    if epilogue == "gelu":
        expected = torch.nn.functional.gelu(expected)
    if epilogue == "relu":
        expected = expected.relu()
    assert y.dtype == dtype
    assert float(((y.double() - expected).abs() / scale).max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", PATTERNS)
def test_products(isa, spec, dtype):
    torch.manual_seed(0)
    pattern, served = Pattern(spec), set()
    few = 40 // pattern.m + 1
    for (out, groups), kernel in itertools.product([(1, 1), (37, 3), (100, few), (64, 8)], KERNELS):
        inputs = groups * pattern.m
        w, bias = sparse(out, inputs, pattern, dtype), torch.randn(out).to(dtype)
        packed = cpu.pack(w, pattern)
        for tokens, epilogue in [
            *((1, "none"), (2, "gelu"), (3, "none"), (7, "relu"), (16, "none"), (17, "gelu")),
            *((33, "none"), (47, "relu"), (53, "gelu"), (130, "none")),
        ]:
            x = torch.randn(tokens, inputs).to(dtype)
            try:
                y = cpu.matmul(x, packed, bias, epilogue, kernel, threads=1)
            except CompressError as error:
                if "does not serve" not in str(error):
                    raise
                break
            served.add(kernel)
            check(y, x, w, bias, epilogue, dtype)
    assert {"auto", "gather", "tokens"} <= served
    assert ("panel" in served) == (pattern.panel % 16 == 0)
    amx = "amx_bf16" in native.features() and isa == "avx512" and dtype == torch.bfloat16
    assert ("tiles" in served) == (amx and pattern.panel % 16 == 0)
    if isa != "portable":
        assert ("permute" in served) == (pattern.m <= 32 and pattern.panel % 16 != 0)


@pytest.mark.parametrize("spec", ["2:4", "1:16", "16:256", "1:16@64"])
def test_threads_change_no_bit(isa, spec):
    torch.manual_seed(1)
    packed = cpu.pack(sparse(300, 1024, Pattern(spec), torch.float32), Pattern(spec))
    for tokens in (1, 20, 197):
        x = torch.randn(tokens, 1024)
        one = cpu.matmul(x, packed, threads=1)
        assert torch.equal(one, cpu.matmul(x, packed, threads=2))


def test_the_own_pool_of_threads(isa):
    """Without torch's OpenMP runtime the library's pool gives the same results."""
    torch.manual_seed(1)
    packed = cpu.pack(sparse(500, 1024, Pattern("1:4"), torch.float32), Pattern("1:4"))
    x = torch.randn(197, 1024)
    expected = cpu.matmul(x, packed, threads=1)
    native.library().nmflow_set_runner(None)
    try:
        for threads in (2, 3, 8, 2):
            assert torch.equal(cpu.matmul(x, packed, threads=threads), expected)
    finally:
        native._share_threads(native.library())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", PATTERNS)
def test_packing_is_lossless(spec, dtype):
    torch.manual_seed(2)
    pattern = Pattern(spec)
    w = sparse(53, pattern.m * 5, pattern, dtype)
    values, index = cpu.canonical(w, pattern)
    packed = cpu.from_canonical(values, index, w.shape[1], pattern)
    cpu.validate(packed)
    size = cpu.sizes(53, w.shape[1], pattern, dtype)
    assert (packed.values.nbytes, packed.codes.nbytes) == size[:2]
    assert (values.nbytes, index.nbytes) == size[2:]
    back_values, back_index = cpu.to_canonical(packed)
    assert torch.equal(back_index, index)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back_values.view(kind), values.view(kind))
    assert torch.equal(cpu.unpack(packed), w)
    # The kernel layout as csrc/nmflow.h states it, read without the library.
    shared = pattern.panel > 1 and pattern.panel % 16 == 0
    per, bits = (8, 4) if pattern.m <= 16 else (4, 8)
    span = 16 // pattern.m * pattern.m if pattern.m <= 16 else pattern.m
    entries = w.shape[1] // pattern.m * pattern.n
    codes = packed.codes if shared else packed.codes.view(torch.int32).view(-1, 16)
    flat = packed.values.view(kind)
    words = -(-entries // per)
    for row, s in itertools.product(range(0, 53, 9), range(entries)):
        start = s // (span // pattern.m * pattern.n) * span
        if shared:
            code = int(codes[row // pattern.panel * entries + s])
        else:
            word = int(codes[row // 16 * words + s // per, row % 16])
            code = word >> s % per * bits & (1 << bits) - 1
        held = entries if dtype == torch.float32 else entries + entries % 2
        at = row // 16 * held * 16 + (
            s * 16 + row % 16 if dtype == torch.float32 else s // 2 * 32 + row % 16 * 2 + s % 2
        )
        assert int(w.view(kind)[row, start + code]) == int(flat[at])


def test_kept_bits_survive():
    w = torch.tensor([[-0.0, 3.0, 0.0, 0.0], [0.0, -0.0, -0.0, float("nan")]])
    w[1, 3] = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)[0]
    back = cpu.unpack(cpu.pack(w, Pattern("2:4")))
    # The free place is the lowest one, here -0.0, and a NaN keeps its payload.
    assert back.view(torch.int32)[0].tolist() == w.view(torch.int32)[0].tolist()
    assert back.view(torch.int32)[1, 3] == 0x7FC12345
    # A place that is not kept comes back as +0.0.
    assert torch.signbit(back[1]).tolist() == [False, False, False, False]


def test_bytes_of_a_packed_weight():
    for (out, inputs), (dtype, limit) in itertools.product(
        [(3072, 768), (768, 3072)], [(torch.float32, 0.075), (torch.bfloat16, 0.08)]
    ):
        size = cpu.sizes(out, inputs, Pattern("1:16"), dtype)
        assert sum(size[:2]) <= limit * out * inputs * dtype.itemsize


@pytest.mark.parametrize("spec", ["2:4", "1:16", "16:256", "1:8@16"])
def test_pruned_inputs_are_not_multiplied(isa, spec):
    """An infinity at an input that no row keeps stays out of the result."""
    pattern = Pattern(spec)
    last = pattern.m - 1
    w = sparse(20, pattern.m * 3, pattern, torch.float32)
    w[:, last] = 0  # groups with too few are filled from the lowest column, so never here
    packed = cpu.pack(w, pattern)
    x = torch.randn(40, w.shape[1])
    x[:, last] = float("inf")
    for kernel in ("auto", "gather", "tokens"):
        assert bool(cpu.matmul(x, packed, kernel=kernel).isfinite().all())


@pytest.mark.parametrize("spec", ["2:4", "3:5", "1:16", "1:32", "4:100", "1:4@16"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides_and_neighbours(isa, spec, dtype):
    """x and y with row strides and odd offsets; nothing beside y's rows is written."""
    torch.manual_seed(3)
    pattern = Pattern(spec)
    inputs, out = pattern.m * 7, 45
    w = sparse(out, inputs, pattern, dtype)
    packed = cpu.pack(w, pattern)
    shape = Shape.of(out, inputs, pattern)
    run = cpu.bind(packed.values, packed.codes, shape)
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
    lib = native.library()
    inputs, out = pattern.m * 3, 35
    packed = cpu.pack(sparse(out, inputs, pattern, dtype), pattern)
    codes = packed.codes.clone()
    if hostile:
        codes = torch.randint(0, 256, codes.shape, dtype=torch.uint8)
    values, coded = Fenced(packed.values), Fenced(codes)
    struct = cpu.struct_of(
        *(values.address, packed.values.numel(), dtype, coded.address, codes.nbytes),
        *(out, inputs, pattern.n, pattern.m, pattern.panel),
    )
    for tokens, kernel in itertools.product((1, 3, 8, 16, 70), range(1, 6)):
        x = torch.randn(tokens, inputs).to(dtype)
        bias = torch.randn(out).to(dtype)
        a, b, y = Fenced(x), Fenced(bias), Fenced(torch.zeros(tokens, out, dtype=dtype))
        status = lib.nmflow_matmul(
            *(struct, a.address, inputs, b.address, y.address, out, tokens, 0, 1, kernel)
        )
        assert status in (0, -8)
        if status == 0 and not hostile:
            held = bytearray(y.bytes(tokens * out * dtype.itemsize))
            got = torch.frombuffer(held, dtype=dtype).view(tokens, out)
            assert torch.allclose(got, cpu.matmul(x, packed, bias), rtol=1e-2, atol=1e-2)


def damaged(packed: cpu.Packed, at: int, value: int) -> cpu.Packed:
    codes = packed.codes.clone()
    codes[at] = value
    return cpu.Packed(packed.values, codes, packed.out, packed.inputs, packed.pattern)


def test_hostile_codes_are_refused():
    torch.manual_seed(5)
    for spec in ("1:16", "2:4", "2:8", "3:5", "1:32", "2:48", "1:4@16", "3:7@32"):
        pattern = Pattern(spec)
        packed = cpu.pack(sparse(40, pattern.m * 6, pattern, torch.float32), pattern)
        before = cpu.unpack(packed)
        refused = 0
        for at in range(0, packed.codes.numel(), 7):
            for value in (0, 255, int(packed.codes[at]) ^ 0x10, int(packed.codes[at]) ^ 1):
                bad = damaged(packed, at, value)
                try:
                    cpu.validate(bad)
                except FileFormatError:
                    refused += 1
                    continue
                # What passes is a right weight: it packs to the very same codes.
                values, index = cpu.to_canonical(bad)
                again = cpu.from_canonical(values, index, bad.inputs, pattern)
                assert torch.equal(again.codes, bad.codes)
        assert refused > 0
        assert torch.equal(cpu.unpack(packed), before)


def test_values_in_the_padding_are_refused():
    packed = cpu.pack(sparse(17, 32, Pattern("1:16"), torch.float32), Pattern("1:16"))
    values = packed.values.clone()
    values[-1] = 1.0
    with pytest.raises(FileFormatError, match="out of range"):
        cpu.validate(cpu.Packed(values, packed.codes, 17, 32, Pattern("1:16")))


def test_wrong_sizes_and_indices_are_refused():
    pattern = Pattern("2:4")
    w = sparse(8, 16, pattern, torch.float32)
    values, index = cpu.canonical(w, pattern)
    packed = cpu.from_canonical(values, index, 16, pattern)
    with pytest.raises(FileFormatError, match="another size"):
        cpu.validate(cpu.Packed(packed.values[:-1], packed.codes, 8, 16, pattern))
    with pytest.raises(FileFormatError, match="another size"):
        cpu.validate(cpu.Packed(packed.values, packed.codes[:-4], 8, 16, pattern))
    with pytest.raises(FileFormatError, match="another size"):
        cpu.from_canonical(values, index[:, :-1], 16, pattern)
    for bad in (index.flip(1), torch.full_like(index, 4), torch.zeros_like(index)):
        with pytest.raises(FileFormatError, match="index"):
            cpu.from_canonical(values, bad, 16, pattern)
        with pytest.raises(FileFormatError, match="index"):
            cpu.dense(values, bad, 16, pattern)
    with pytest.raises(CompressError, match="more non-zeros"):
        cpu.pack(torch.ones(8, 16), pattern)
    with pytest.raises(CompressError, match="more non-zeros"):
        cpu.pack(sparse(32, 64, Pattern("1:8"), torch.float32), Pattern("1:8@16"))
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(CompressError, match="dtype"):
            cpu.pack(torch.zeros(8, 16, dtype=dtype), pattern)
    with pytest.raises(CompressError, match="256"):
        cpu.pack(torch.zeros(2, 512), Pattern("1:512"))
    with pytest.raises(CompressError):
        cpu.pack(torch.zeros(2, 18), pattern)


def test_calls_that_do_not_fit_are_refused():
    packed = cpu.pack(sparse(8, 16, Pattern("1:16"), torch.float32), Pattern("1:16"))
    with pytest.raises(CompressError, match="x is"):
        cpu.matmul(torch.zeros(2, 15), packed)
    with pytest.raises(CompressError, match="x is"):
        cpu.matmul(torch.zeros(2, 16, dtype=torch.bfloat16), packed)
    with pytest.raises(CompressError, match="bias is"):
        cpu.matmul(torch.zeros(2, 16), packed, torch.zeros(7))
    with pytest.raises(CompressError, match="does not serve"):
        cpu.matmul(torch.zeros(2, 16), packed, kernel="panel")
    assert cpu.matmul(torch.zeros(0, 16), packed).shape == (0, 8)
    assert cpu.matmul(torch.zeros(2, 3, 16), packed).shape == (2, 3, 8)


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
    shape = cpu_layout.ShapeStruct(*numbers.values())
    assert cpu_layout.lib().nmflow_sizes(ctypes.byref(shape), None, None, None, None) == status


def test_the_boundary_refuses_calls():
    lib = cpu_layout.lib()
    packed = cpu.pack(sparse(8, 16, Pattern("2:4"), torch.float32), Pattern("2:4"))
    struct = cpu_layout.packed_struct(packed)
    x, y = torch.zeros(2, 16), torch.zeros(2, 8)
    good = [struct, x.data_ptr(), 16, None, y.data_ptr(), 8, 2, 0, 1, 0]
    assert lib.nmflow_matmul(*good) == 0
    for at, value, status in [
        *((0, None, -4), (1, None, -4), (2, 15, -2), (4, None, -4), (5, 7, -2), (6, -1, -2)),
        *((2, 2**62, -2), (6, 2**60, -2), (7, 3, -3), (9, 5, -8), (9, 4, -8), (9, 99, -8)),
    ]:
        args = list(good)
        args[at] = value
        assert lib.nmflow_matmul(*args) == status, (at, value)


def test_choices_have_names():
    packed = cpu.pack(sparse(64, 64, Pattern("1:16"), torch.float32), Pattern("1:16"))
    assert cpu.choose(packed, 1) in KERNELS
    shared = cpu.pack(sparse(64, 64, Pattern("1:16@16"), torch.float32), Pattern("1:16@16"))
    assert cpu.choose(shared, 1) == "panel"
    named = native.library().nmflow_kernel_name
    named.restype = ctypes.c_char_p
    assert [named(i).decode() for i in range(len(KERNELS))] == list(KERNELS)
