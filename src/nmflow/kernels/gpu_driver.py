"""Compile CUDA C++ by NVRTC and launch it by the driver, both through ctypes.

CUDA builds of torch bring NVRTC, so that an install needs no compiler. Nothing here waits for the
device, and nothing is allocated on it but the code itself.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch

from nmflow.errors import CompressError
from nmflow.kernels.gpu_plan import Card, Kernel

HEADERS = ("device.h", "finish.h", "fragment.h", "fragment8.h", "sixteen.h", "stream.h")
OLDEST = (8, 0)
"""The compute capability that fragments of bfloat16 and asynchronous copies need."""

GROUPS = (9, 0)
"""The one that has products of warp groups (`wgmma`)."""


class Launcher(Protocol):
    """What runs a kernel: the driver of a GPU, or an emulation of one."""

    card: Card

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        """Run a kernel on ctypes values."""
        ...


def nvrtc_path() -> str:
    """Where the run-time compiler of CUDA lies; empty where it is not."""
    places = [Path(torch.__file__).parent / "lib"]
    spec = importlib.util.find_spec("nvidia")  # the wheels that torch's CUDA builds ask for
    places += [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for place in places:
        found = sorted(place.rglob("libnvrtc.so*")) + sorted(place.rglob("nvrtc64*.dll"))
        if found:
            return str(found[0])
    return ctypes.util.find_library("nvrtc") or ""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    path = nvrtc_path()
    if not path:
        raise CompressError(
            "there is no libnvrtc beside torch, which compiles the kernels of a GPU: install the "
            "wheel nvidia-cuda-nvrtc of your CUDA"
        )
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise CompressError(f"{path} cannot be loaded ({error}): reinstall it") from error


def architectures() -> list[int]:
    """The architectures that the compiler knows, such as 90, in order."""
    library, count = _nvrtc(), ctypes.c_int()
    _compiled(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), library)
    known = (ctypes.c_int * count.value)()
    _compiled(library.nvrtcGetSupportedArchs(known), library)
    return sorted(known)


def compile_kernel(kernel: Kernel, architecture: int) -> bytes:
    """Machine code of a kernel, or PTX where the compiler is older than the card.

    Raises:
        CompressError: the compiler is missing, or does not take the source.
    """
    library, program = _nvrtc(), ctypes.c_void_p()
    known = architectures()
    native = architecture in known
    target = architecture if native else max((a for a in known if a < architecture), default=0)
    if not target:
        raise CompressError(f"this NVRTC knows no architecture of sm_{architecture} or below")
    folder = files("nmflow.kernels") / "cuda"
    source = (folder / kernel.file).read_bytes()
    text, count = ctypes.c_char_p, len(HEADERS)
    headers = (text * count)(*((folder / name).read_bytes() for name in HEADERS))
    names = (text * count)(*(name.encode() for name in HEADERS))
    status = library.nvrtcCreateProgram(
        ctypes.byref(program), source, kernel.file.encode(), count, headers, names
    )
    _compiled(status, library)
    try:
        constants = dict(kernel.constants)
        constants |= {name: constants.get(name, 0) for name in ("HALF", "INT8")}
        special = "a" * constants.setdefault("GROUPS", 0)  # instructions of one architecture alone
        options = [
            f"--gpu-architecture={'sm' if native else 'compute'}_{target}{special}",
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in constants.items()),
        ]
        given = (text * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        if status:
            log = _read(library, program, "ProgramLog").decode(errors="replace")
            raise CompressError(f"NVRTC does not compile {kernel.file}: {' '.join(log.split())}")
        return _read(library, program, "CUBIN" if native else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _compiled(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), library)
    buffer = ctypes.create_string_buffer(size.value)
    _compiled(getattr(library, f"nvrtcGet{what}")(program, buffer), library)
    return buffer.raw


def _compiled(status: int, library: ctypes.CDLL) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompressError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}")


@functools.cache
def why_not() -> str | None:
    """Why no kernel can be launched on the current GPU, in words; None if they can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip:
        return "these kernels are NVIDIA's CUDA, and this torch is built for AMD"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return (
            f"the GPU ({torch.cuda.get_device_name()}) is sm_{found[0]}{found[1]}, and fragments "
            f"need sm_{OLDEST[0]}{OLDEST[1]} or newer"
        )
    try:
        _nvrtc()
        _cuda()
    except CompressError as error:
        return str(error)
    return None


@functools.cache
def groups() -> bool:
    """Whether the current GPU has products of warp groups, and kernels can be launched on it."""
    return why_not() is None and torch.cuda.get_device_capability() == GROUPS


@functools.cache
def _cuda() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompressError("the driver of the GPU (libcuda.so.1) cannot be loaded: install it")


@functools.cache
def driver(device: int) -> Driver:
    """The driver of the GPU of that index."""
    return Driver(device)


class Driver:
    """Launches kernels on one GPU, on torch's current stream; each is compiled at its first use."""

    def __init__(self, device: int) -> None:
        self.device = device
        major, minor = torch.cuda.get_device_capability(device)
        self.architecture = 10 * major + minor
        self._library, self._context = _cuda(), ctypes.c_void_p()
        self._functions: dict[tuple[Kernel, int], ctypes.c_void_p] = {}
        torch.cuda.current_stream(device)  # torch sets its context up
        handle = ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
        status = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle)
        self._check(status, "cuDevicePrimaryCtxRetain")
        numbers = (self._attribute(what, handle) for what in (16, 97))
        self.card = Card(*numbers, groups=(major, minor) == GROUPS)

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        """Queue a kernel on the current stream.

        Raises:
            CompressError: it does not compile, or the driver refuses the launch.
        """
        library = self._library
        given = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        # The context of another GPU may be current in this thread.
        self._check(library.cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            function = self._functions.get((kernel, shared)) or self._load(kernel, shared)
            status = library.cuLaunchKernel(
                function, *grid, threads, 1, 1, shared, stream, given, None
            )
            self._check(status, f"cuLaunchKernel of {kernel.function}")
        finally:
            library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _load(self, kernel: Kernel, shared: int) -> ctypes.c_void_p:
        library, module, function = self._library, ctypes.c_void_p(), ctypes.c_void_p()
        code = compile_kernel(kernel, self.architecture)
        # Loading is no work of a stream, so a capture that goes on in this thread allows it.
        mode = ctypes.c_int(2)  # relaxed
        library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            self._check(library.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
            name = kernel.function.encode()
            status = library.cuModuleGetFunction(ctypes.byref(function), module, name)
            self._check(status, "cuModuleGetFunction")
            # 8: the most shared memory that a launch may ask for
            self._check(library.cuFuncSetAttribute(function, 8, shared), "cuFuncSetAttribute")
        finally:
            library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        self._functions[kernel, shared] = function
        return function

    def _attribute(self, number: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        status = self._library.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        self._check(status, "cuDeviceGetAttribute")
        return value.value

    def _check(self, status: int, what: str) -> None:
        if status:
            said = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(said))
            why = said.value.decode() if said.value else f"error {status}"
            raise CompressError(f"{what} on GPU {self.device} failed: {why}")
