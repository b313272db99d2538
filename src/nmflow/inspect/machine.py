"""`doctor`: what this machine can run, what is slow here and why, and what to install."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nmflow import native
from nmflow.text_table import table
from nmflow.version import __version__


@dataclass(frozen=True)
class Finding:
    """One check and its result.

    Attributes:
        what: what was checked.
        state: `"ok"`, `"slow"`, `"missing"` or `"unused"`; the last two cost nothing here.
        found: what was found.
        mend: what to do about it; empty if there is nothing to do.
    """

    what: str
    state: str
    found: str
    mend: str = ""


class Doctor(list[Finding]):
    """The findings; as `str`, a table with the advice below it.

    Attributes:
        ok: whether nothing is slow.
    """

    @property
    def ok(self) -> bool:
        """Whether nothing is slow."""
        return all(one.state != "slow" for one in self)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {"ok": self.ok, "findings": [asdict(one) for one in self]}

    def __str__(self) -> str:
        rows = [["what", "state", "found"], *([f.what, f.state, f.found] for f in self)]
        advice = [f"{f.what}: {f.mend}" for f in self if f.mend]
        return "\n".join([table(rows), *([""] if advice else []), *advice])


def doctor() -> Doctor:
    """Look at torch, the compiled kernels, threads, the GPU and the optional packages.

    Returns:
        The findings. Nothing is installed or changed.

    Example:
        >>> from nmflow.inspect.machine import doctor
        >>> doctor()[0].what
        'nmflow'
    """
    found = [
        Finding("nmflow", "ok", f"{__version__}, Python {platform.python_version()}"),
        Finding("torch", "ok", f"{torch.__version__}, {_onednn()}"),
        *_kernels(),
        _threads(),
        *_gpu(),
        *(_extra(name, packages) for name, packages in extras().items()),
    ]
    return Doctor(found)


def _onednn() -> str:
    return "with oneDNN" if torch.backends.mkldnn.is_available() else "without oneDNN"


def _kernels() -> Iterable[Finding]:
    if not native.available():
        yield Finding(
            "CPU kernels",
            "slow",
            f"not loaded: {native.why_not()}",
            "plain torch serves masks and packed layers, many times slower; install a C++17 "
            "compiler, then run pip install --force-reinstall --no-deps nmflow",
        )
        return
    isa, features = native.isa(), native.features()
    has = f"{isa}; the processor has {', '.join(features) or 'none of the extensions used'}"
    if isa == "portable":
        mend = "the kernels run without vector extensions: this processor or NMFLOW_ISA has none"
        yield Finding("CPU kernels", "slow", has, mend)
    else:
        yield Finding("CPU kernels", "ok", has)
    if "avx512_bf16" not in features:
        yield Finding(
            "bfloat16 products",
            "unused",
            "the processor has no bfloat16 instructions",
            "pack and train in float32 on this processor: products in bfloat16 take several times "
            "as long in torch, and nmflow converts it on the way",
        )
    elif "amx_bf16" in features:
        yield Finding("bfloat16 products", "ok", "AMX, for panels; AVX-512 for single rows")
    else:
        yield Finding("bfloat16 products", "ok", "AVX-512")


def _threads() -> Finding:
    used, there = torch.get_num_threads(), len(_cores())
    found = f"torch uses {used} of {there} cores"
    if used > there:
        mend = f"more threads than cores slow each other down: set OMP_NUM_THREADS={there}"
        return Finding("threads", "slow", found, mend)
    return Finding("threads", "ok", found)


def _cores() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _gpu() -> Iterable[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds none" if built else "this torch is built for CPUs"
        yield Finding("GPU", "unused", why)
        return
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    yield Finding("GPU", "ok", f"{name}, sm_{major}{minor}")
    from nmflow.masks import triton

    if why := triton.why_not():
        mend = "plain torch computes masks on the GPU; install the triton of your torch, and gcc"
        yield Finding("Triton", "slow", why, mend)
    else:
        # Its distribution has several names: pytorch-triton, triton-windows.
        import triton as package  # pyright: ignore[reportMissingImports]

        yield Finding("Triton", "ok", package.__version__)
    from nmflow.kernels import gpu_driver

    nvrtc = Path(gpu_driver.nvrtc_path()).name
    if why := gpu_driver.why_not():
        yield Finding("packed layers on the GPU", "slow", why, "they run on a dense weight")
    else:
        yield Finding("packed layers on the GPU", "ok", f"compiled by {nvrtc}")


def extras() -> dict[str, list[str]]:
    """The optional packages by the extra of nmflow that installs them, as nmflow was installed.

    The extras for nmflow's developers (`dev`, `docs`) are left out.
    """
    found: dict[str, list[str]] = {}
    try:
        needs = importlib.metadata.requires("nmflow") or []
    except importlib.metadata.PackageNotFoundError:  # the sources on the path, not installed
        return found
    for need in needs:
        package, extra = re.match(r"[\w.-]+", need), re.search(r"extra == ['\"]([\w-]+)", need)
        if package is None or extra is None or re.fullmatch("docs|(.*-)?dev", extra[1]):
            continue
        if package[0] != "nmflow":
            found.setdefault(extra[1], []).append(package[0])
    return found


def _extra(name: str, packages: list[str]) -> Finding:
    there = {package: version for package in packages if (version := _version(package))}
    absent = [package for package in packages if package not in there]
    if absent:
        mend = f"for what needs it: pip install 'nmflow[{name}]'"
        return Finding(f"extra {name}", "missing", f"without {_few(absent)}", mend)
    return Finding(f"extra {name}", "ok", _few([f"{p} {v}" for p, v in there.items()]))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
