"""The compiled kernels on 8-bit values: exact in integers, and against hostile streams."""

import ctypes
import itertools
from functools import partial

import pytest
import torch

from nmflow import mask, native
from nmflow.errors import CompressError, FileFormatError
from nmflow.kernels import cpu_int8, int8
from nmflow.kernels.layout import Shape, canonical_from_dense

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

# Those with a kernel of their own on some instruction set, those of its edges, and others.
PATTERNS = [
    *("1:4", "2:4", "3:4", "1:8", "2:8", "4:8", "1:16", "2:16", "4:16", "8:16", "1:2", "1:1"),
    *("1:32", "2:32", "16:64", "1:64", "3:5", "2:7", "5:17", "3:96", "16:256"),
    *("1:16@16", "1:4@5", "2:8@4", "1:32@16"),
]
KERNELS = ["auto", "gather", "tokens", "permute"]
SIZES = [(1, 1), (37, 3), (64, 8), (100, 7)]
TOKENS = (1, 3, 7, 16, 37, 70)


@pytest.fixture(params=native.ISAS[:3])  # tiles: test_tiles.py
def isa(request):
    before = native.isa()
    if native.set_isa(request.param) != request.param:
        native.set_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.set_isa(before)


def weight(spec: str, out: int, groups: int) -> tuple[torch.Tensor, Shape]:
    """A random stream and its shape."""
    m = int(spec.partition(":")[2].partition("@")[0])
    w = torch.randn(out, groups * m)
    w *= mask(w, spec)
    shape = Shape.of(out, groups * m, spec)
    values, index = canonical_from_dense(w, shape)
    return int8.stream_from_canonical(*int8.round_values(values), index, shape), shape


def run(stream, shape, x, bias=None, activations=0, epilogue=0, kernel=0):
    y = torch.full((len(x), shape.out), torch.nan).to(x.dtype)
    bound = cpu_int8.bind(stream, shape, x.dtype, activations)
    bound(x, bias, y, len(x), epilogue, kernel)
    return y


@pytest.mark.parametrize("spec", PATTERNS)
def test_float_activations_are_products_with_the_exact_dense_weight(isa, spec):
    torch.manual_seed(0)
    served = set()
    for out, groups in SIZES:
        stream, shape = weight(spec, out, groups)
        w = int8.dense(stream, shape).double()
        for tokens in TOKENS:
            x, bias = torch.randn(tokens, shape.inputs), torch.randn(out)
            wide = x.double() @ w.T + bias.double()
            scale = x.double().abs() @ w.abs().T + bias.double().abs()
            for number, kernel in enumerate(KERNELS):
                try:
                    y = run(stream, shape, x, bias, 0, 2, number)
                except CompressError as error:
                    if "does not serve" not in str(error):
                        raise
                    continue
                served.add(kernel)
                assert float(((y - wide.relu()).abs() / scale).max()) <= 2e-6
    assert {"auto", "gather", "tokens"} <= served
    own = spec in ("1:4", "2:4", "1:8", "2:8", "1:16", "2:16", "1:16@16", "1:4@5", "2:8@4")
    both = isa == "avx2" and spec in ("1:32", "2:32", "1:32@16")
    assert ("permute" in served) == ((isa != "portable" and own) or both)


def whole(spec: str, out: int, groups: int, q: torch.Tensor | None = None):
    """A stream whose scales are 1, its shape and its dense weight, of random places and values."""
    shape = weight(spec, out, groups)[1]
    if q is None:
        q = torch.randint(-127, 128, (out, shape.entries), dtype=torch.int8)
    rows = torch.rand(shape.lists, groups, shape.m)
    index = rows.topk(shape.n, 2).indices.sort(2).values.flatten(1).to(torch.uint8)
    stream = int8.stream_from_canonical(q, torch.ones(out), index, shape)
    return stream, shape, int8.dense(stream, shape).double()


@pytest.mark.parametrize("spec", PATTERNS)
def test_int8_activations_are_exact_in_integers(isa, spec):
    """Inputs and weights whose scales are 1: y is a whole number, to the last digit."""
    torch.manual_seed(0)
    for out, groups in SIZES:
        stream, shape, w = whole(spec, out, groups)
        for tokens in TOKENS:
            x = torch.randint(-127, 128, (tokens, shape.inputs)).float()
            x[:, 0] = 127
            for dtype in (torch.float32, torch.bfloat16):  # whole numbers up to 256 are exact
                want = (x.double() @ w.T).float().to(dtype)
                assert torch.equal(run(stream, shape, x.to(dtype), None, 1), want)


@pytest.mark.parametrize(
    ("spec", "groups"),
    [
        *(("2:4", 301), ("1:4", 301), ("3:4", 150), ("8:16", 60), ("1:8", 301), ("2:16", 150)),
        *(("1:16", 150), ("1:16", 1041), ("1:1", 300), ("16:64", 30), ("1:128", 100)),
        *(("1:32", 1041), ("1:5", 1040), ("1:5", 1041)),  # of 1:5, fp32 holds the first one's sums
    ],
)
def test_long_rows_of_the_largest_numbers_are_exact(isa, spec, groups):
    torch.manual_seed(0)
    out = 33
    shape = weight(spec, out, groups)[1]
    q = torch.full((out, shape.entries), 127, dtype=torch.int8)
    q[1::3] = -127
    q[2::3] = (torch.randint(0, 2, q[2::3].shape) * 254 - 127).to(torch.int8)
    stream, shape, w = whole(spec, out, groups, q)
    x = torch.full((66, shape.inputs), 127.0)
    x[1::3] = -127
    x[2::3] = torch.randint(0, 2, x[2::3].shape) * 254.0 - 127
    for tokens in (1, 3, 5, 66):
        y = run(stream, shape, x[:tokens], None, 1)
        assert torch.equal(y, (x[:tokens].double() @ w.T).float())


@pytest.mark.parametrize("dtype", int8.DTYPES, ids=str)
@pytest.mark.parametrize("spec", ["1:4", "2:4", "1:8", "1:16", "1:32", "3:5"])
def test_int8_activations_round_as_the_reference_does(isa, spec, dtype):
    torch.manual_seed(1)
    stream, shape = weight(spec, 50, 24)
    w = int8.dense(stream, shape).abs()
    for epilogue in range(5):
        x = torch.randn(21, shape.inputs).to(dtype)
        bias = torch.randn(50).to(dtype)
        y = run(stream, shape, x, bias, 1, epilogue)
        want = int8.matmul(x, stream, bias, shape, 1, epilogue)
        scale = x.float().abs() @ w.T + bias.float().abs() + 1e-6
        tolerance = 5e-7 if dtype == torch.float32 else 2.0**-8
        assert float(((y - want).float().abs() / scale).max()) <= tolerance


def test_tokens_that_have_no_scale(isa):
    stream, shape = weight("1:8", 20, 4)
    x = torch.randn(5, 32)
    x[1] = 0
    x[2] = 1e-31
    x[3, 7], x[4, 7] = torch.nan, torch.inf
    bias = torch.randn(20)
    y = run(stream, shape, x, bias, 1)
    assert torch.equal(y[1:3], bias.expand(2, -1))
    assert y[3:].isnan().all()
    torch.testing.assert_close(y, int8.matmul(x, stream, bias, shape, 1), equal_nan=True)


@pytest.mark.parametrize("activations", [0, 1])
@pytest.mark.parametrize("spec", ["1:4", "1:16", "1:32", "3:5"])
@pytest.mark.parametrize("out", [300, 144])  # of 9 tiles, parts have 3
def test_threads_and_strides_change_no_bit(isa, spec, activations, out):
    torch.manual_seed(2)
    stream, shape = weight(spec, out, 30)
    threads = torch.get_num_threads()
    for tokens in (1, 20, 197):
        wide = torch.randn(tokens, shape.inputs + 5)
        x = wide[:, 3 : 3 + shape.inputs]
        one = run(stream, shape, x, None, activations)
        assert torch.equal(one, run(stream, shape, x.contiguous(), None, activations))
        torch.set_num_threads(2)
        try:
            assert torch.equal(one, run(stream, shape, x, None, activations))
        finally:
            torch.set_num_threads(threads)


def is_right(stream: torch.Tensor, shape: Shape) -> bool:
    """By plain torch: what it holds is a weight, and makes the very same stream."""
    found = int8.canonical_from_stream(stream, shape)
    try:
        int8.check_canonical(*found, shape)
    except CompressError:
        return False
    return torch.equal(int8.stream_from_canonical(*found, shape), stream)


def test_streams_are_refused_where_plain_torch_refuses_them():
    generator = torch.Generator().manual_seed(5)
    verdicts = {True: 0, False: 0}
    for spec, rows in itertools.product([*PATTERNS, "1:8@2", "2:16@3"], (40, 64, 3)):
        stream, shape = weight(spec, rows, 6)
        cpu_int8.bind(stream, shape, torch.float32, 0)
        size = stream.numel()
        for at in [*torch.randint(size, (8,), generator=generator).tolist(), size - 1]:
            good = int(stream.view(-1)[at])
            for value in (0, 128, 255, good ^ 0x10, good ^ 1):
                other = stream.clone()
                other.view(-1)[at] = value
                right = is_right(other, shape)
                verdicts[right] += 1
                try:
                    cpu_int8.bind(other, shape, torch.float32, 0)
                except FileFormatError:
                    assert not right, (spec, rows, at, value)
                else:
                    assert right, (spec, rows, at, value)
    assert min(verdicts.values()) > 100


# Rows, tile, and what its bytes become.
DAMAGE = {
    "codes past their group": (32, 0, {128: 255}),
    "a value of -128": (32, 0, {128 + 64: 128}),
    "a scale that is NaN": (32, 0, {2: 0xC0, 3: 0x7F}),
    "a negative scale": (32, 0, {3: 0xBF}),
    "another sum": (32, 0, {64: 99}),
    "values in a row past the last": (31, 1, {128 + 64 + 15 * 4: 5}),
    "a scale of a row past the last": (31, 1, {15 * 4: 1}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_validation_finds_damage_and_products_stay_inside(isa, name):
    """`1:5` takes kernels of any pattern, `1:8` its own; codes of 4 bits reach past both."""
    out, tile, bytes_of = DAMAGE[name]
    for spec in ("1:5", "1:8"):
        stream, shape = weight(spec, out, 8)
        for place, byte in bytes_of.items():
            stream[tile, place] = byte
        with pytest.raises(FileFormatError, match="packed weight of shape"):
            cpu_int8.bind(stream, shape, torch.float32, 0)
        struct = cpu_int8.Int8Struct.of(stream, shape, torch.float32)
        x, y = torch.randn(9, shape.inputs), torch.empty(9, shape.out)
        multiply = partial(cpu_int8.lib().nmflow_int8_matmul, ctypes.byref(struct))
        for activations in (0, 1):
            tail = (x.data_ptr(), shape.inputs, None, y.data_ptr(), shape.out, 9, 0, 1, 0)
            assert multiply(activations, *tail) == 0


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"bytes": -1}, -5),
        ({"activations": 2}, -3),
        ({"x_stride": 1}, -2),
        ({"tokens": -1}, -2),
        ({"epilogue": 5}, -3),
        ({"kernel": 5}, -8),
        ({"kernel": 99}, -8),
        ({"x": None}, -4),
        ({"data": None}, -4),
        ({"dtype": 7}, -3),
        ({"out": 1 << 62}, -2),
        ({"m": 7}, -1),
        ({"in": (131_072 + 1) * 16}, -2),
    ],
    ids=str,
)
def test_what_the_boundary_refuses(change, status):
    stream, shape = weight("1:16", 20, 4)
    x, y = torch.randn(3, shape.inputs), torch.empty(3, shape.out)
    said = {"out": 20, "in": 64, "n": 1, "m": 16, "panel": 1, "dtype": 0, "bytes": stream.nbytes}
    said |= {"activations": 0, "x": x.data_ptr(), "x_stride": 64, "tokens": 3, "epilogue": 0}
    said |= {"kernel": 0, "data": stream.data_ptr()} | change
    numbers = [said[k] for k in ("out", "in", "n", "m", "panel", "dtype")]
    struct = cpu_int8.Int8Struct(cpu_int8.ShapeStruct(*numbers), said["data"], said["bytes"])
    found = cpu_int8.lib().nmflow_int8_matmul(
        *(ctypes.byref(struct), said["activations"], said["x"], said["x_stride"], None),
        *(y.data_ptr(), 20, said["tokens"], said["epilogue"], 1, said["kernel"]),
    )
    assert found == status


def test_the_size_is_the_one_of_the_layout_in_python():
    for spec in PATTERNS:
        for out, groups in SIZES:
            stream, shape = weight(spec, out, groups)
            size = ctypes.c_int64()
            struct = cpu_int8.ShapeStruct.of(shape, torch.float32)
            assert not cpu_int8.lib().nmflow_int8_bytes(ctypes.byref(struct), ctypes.byref(size))
            assert size.value == stream.nbytes
