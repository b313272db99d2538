"""The optional compiled library, loaded with ctypes: is it there, and what can it do here.

The library (`csrc/`, its C ABI in `csrc/common/nmflow.h`) is built when the package is
installed and a C++ compiler is at hand. Without it `available()` is False, `why_not()` says why,
and the rest of nmflow works in pure torch, slower. Setting `NMFLOW_NATIVE=0` leaves it unloaded;
`NMFLOW_ISA=portable|avx2|avx512|amx` caps the instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from nmflow.errors import NMFlowError

ABI_VERSION = 9
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = ("portable", "avx2", "avx512", "amx")
FEATURES = ("avx2", "avx512", "avx512_bf16", "amx_bf16", "avx512_vnni")
NOT_FINITE = 1
# What `nmflow_status` says, in words; the caller adds the parameter's name and its value.
REASONS = {
    NOT_FINITE: "holds a NaN or an infinity",
    2: "keeps more than its pattern allows",
    -1: "has a pattern that does not fit it (1 <= N <= M <= 256, inputs a multiple of M)",
    -2: "has a size that is negative or overflows",
    -3: "has a dtype or an epilogue that the kernels do not know",
    -4: "is missing a buffer",
    -5: "has a buffer of another size than its shape demands",
    -6: "has an index that is out of range, repeated or out of order",
    -7: "needs more scratch memory than there is",
    -8: "asks for a kernel that does not serve this case on this machine",
}


def path() -> Path | None:
    """The compiled library's file, whether or not it can be loaded; None where there is none."""
    # NMFLOW_LIBRARY names another build of the same sources, such as one with sanitizers.
    named = os.environ.get("NMFLOW_LIBRARY")
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob("_native.*"))
    return next((file for file in found if file.suffix in (".so", ".dll", ".dylib")), None)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason in one clause."""
    if os.environ.get("NMFLOW_NATIVE", "1") == "0":
        return None, "NMFLOW_NATIVE=0 is set"
    found = path()
    if found is None:
        return None, (
            "the library was not built when nmflow was installed; install a C++17 compiler and "
            "run `pip install --force-reinstall --no-deps --no-cache-dir nmflow`"
        )
    try:
        lib = ctypes.CDLL(str(found))
        version = lib.nmflow_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{found.name} cannot be loaded ({error})"
    if version != ABI_VERSION:
        return None, (
            f"{found.name} has ABI version {version} and this code needs {ABI_VERSION}; "
            "reinstall nmflow"
        )
    _declare(lib)
    _share_threads(lib)
    return lib, ""


def _declare(lib: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    lib.nmflow_project.argtypes = [
        *(pointer, i32, i64, i64, i64, i64, i64, i64, ctypes.c_double),
        *(pointer, ctypes.c_double, pointer, pointer, pointer, i32),
    ]
    lib.nmflow_hold.argtypes = [
        *(pointer, i32, i64, i64, pointer, ctypes.c_double, pointer, ctypes.c_double),
        *(pointer, pointer, pointer, i32),
    ]
    lib.nmflow_take.argtypes = [pointer, pointer, pointer, i64, i64, pointer, i32]
    lib.nmflow_put.argtypes = [pointer, pointer, pointer, i64, i64, pointer, pointer, pointer, i32]
    lib.nmflow_prints.argtypes = [pointer, i64, i64, pointer, pointer, i32]
    lib.nmflow_set_isa.argtypes = [i32]
    lib.nmflow_emulate_tiles.argtypes = [i32]
    lib.nmflow_emulated_dot.argtypes = [i32, i32, i32, pointer, pointer, pointer]
    lib.nmflow_set_runner.argtypes = [pointer]
    lib.nmflow_set_runner.restype = None
    lib.nmflow_compiler.restype = ctypes.c_char_p


def _share_threads(lib: ctypes.CDLL) -> None:
    """Run the library's tasks on the OpenMP runtime torch has loaded, if it can be found.

    Looked up through torch's own library, so it is the very runtime torch links to and not a
    second copy, whose spinning workers would compete for the cores.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                runner = ctypes.CDLL(str(folder / name)).GOMP_parallel
            except (OSError, AttributeError):
                continue
            lib.nmflow_set_runner(ctypes.cast(runner, ctypes.c_void_p))
            return


def available() -> bool:
    """Whether the compiled library is loaded and serves this machine."""
    return _load()[0] is not None


def why_not() -> str:
    """Why `available()` is False, in one clause; empty when it is True."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NMFlowError: it is not available.
    """
    lib, why = _load()
    if lib is None:
        raise NMFlowError(f"the native library is not available: {why}")
    return lib


def isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512", or "amx" (that, and tiles)."""
    return ISAS[library().nmflow_isa_now()]


def set_isa(name: str) -> str:
    """Cap the instruction set (for tests and benchmarks); returns the one now in use.

    A set that this machine lacks changes nothing.

    Raises:
        NMFlowError: an unknown name, or the library is not available.
    """
    if name not in ISAS:
        raise NMFlowError(f"isa is {name!r}: it must be one of {', '.join(ISAS)}")
    return ISAS[library().nmflow_set_isa(ISAS.index(name))]


def emulate_tiles(on: bool) -> bool:
    """Have tiles of AMX computed in C++ (for tests), exactly and slowly; returns whether they are.

    `set_isa("amx")` then works on any machine with AVX-512 and its bfloat16 products. Turned off,
    a machine without tiles falls back to "avx512".
    """
    return bool(library().nmflow_emulate_tiles(on))


def features() -> tuple[str, ...]:
    """The CPU features that the library found usable, of `FEATURES`."""
    bits = library().nmflow_cpu_features()
    return tuple(name for i, name in enumerate(FEATURES) if bits >> i & 1)
