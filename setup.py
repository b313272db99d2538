"""Build the optional native library; pyproject.toml says everything else.

The library is a plain C ABI loaded with ctypes, so it links to neither Python nor torch: one wheel
serves every Python on a platform. Where it cannot be built (no compiler, or one that fails) the
package installs without it and says so once; pure torch then serves every call, slower and just as
right. `NMFLOW_BUILD=required` makes that an error, for whoever makes wheels; `NMFLOW_BUILD=none`
leaves the library out, for the wheel of every other platform.

The compiler is GCC or clang, on Windows too, since the sources use GCC's vector extension. It is
run here and not by setuptools, which would take MSVC's on Windows. `CXX` names another, which may
compile for another machine: its own macros say for which.
"""

import functools
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError, PlatformError

HERE = Path(__file__).resolve().parent
WANTED = os.environ.get("NMFLOW_BUILD", "optional")
if WANTED not in ("optional", "required", "none"):
    sys.exit(f"NMFLOW_BUILD is {WANTED!r}: it must be optional, required or none")
COMMON = [
    "-std=c++17",
    # -O2, not -O3: GCC 12 at -O3 has miscompiled tie handling in loops like those of the masks.
    "-O2",
    "-ftree-vectorize",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-DNDEBUG",
]
# Per-file targets: the dispatcher in abi.cpp asks the CPU before it calls into one of them.
TARGETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "avx512": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
}
TARGETS["vnni"] = [*TARGETS["avx512"], "-mavx512vnni", "-mavx512vbmi"]
# Left out together, and alone, where the compiler is too old to know them.
TARGETS["bf16"] = [*TARGETS["avx512"], "-mavx512bf16"]
TARGETS["amx"] = [*TARGETS["bf16"], "-mamx-tile", "-mamx-bf16"]
NEWEST = ("_bf16", "_amx")
FAILURES = (BaseError, OSError)
# Where LLVM and Visual Studio put clang on Windows, if not on the PATH.
ON_WINDOWS = ("LLVM/bin", "Microsoft Visual Studio/*/*/VC/Tools/Llvm/x64/bin")


def candidates() -> list:
    """Commands that may be a compiler of this machine, the best first."""
    named = os.environ.get("CXX", "")
    if named:
        return [[named] if which(named) else shlex.split(named, posix=os.name != "nt")]
    if os.name != "nt":
        return [[next((c for c in ("c++", "g++", "clang++") if which(c)), "c++")]]
    roots = [
        os.environ[name] for name in ("ProgramFiles", "ProgramFiles(x86)") if name in os.environ
    ]
    there = [
        str(file)
        for root in roots
        for place in ON_WINDOWS
        for name in ("clang++.exe", "clang-cl.exe")
        for file in sorted(Path(root).glob(f"{place}/{name}"))
    ]
    return [[name] for name in ("clang++", "clang-cl", "g++") if which(name)] + [[f] for f in there]


@functools.cache
def compiler() -> tuple:
    """The compiler's command and the names of its macros; raises `PlatformError` without one."""
    said = "no clang and no g++ is on the PATH, nor clang where LLVM and Visual Studio put it"
    for command in candidates():
        if Path(command[0]).stem.lower() == "clang-cl":
            command = [*command, "--driver-mode=g++"]
        asked = [*command, "-dM", "-E", "-x", "c++", "-"]
        done = subprocess.run(asked, input="", capture_output=True, text=True, check=False)
        macros = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("#def")}
        if "__GNUC__" in macros or "__clang__" in macros:
            return command, frozenset(macros)
        said = (
            f"{' '.join(command)} does not run or is no GCC or clang: {done.stderr.strip()[:200]}"
        )
    raise PlatformError(said)


def target_flags(source: str) -> list:
    """Flags for one file, by its name: `*_avx2.cpp`, `*_avx512.cpp`, or none."""
    stem = Path(source).stem
    return [flag for name, flags in TARGETS.items() if stem.endswith("_" + name) for flag in flags]


def compile_flags(macros: frozenset) -> list:
    """Flags for every file, by what the compiler is and compiles for."""
    flags = list(COMMON)
    if "__clang__" not in macros:
        flags.append("-fvect-cost-model=dynamic")
    if "_WIN32" in macros:
        flags.append("-D_CRT_SECURE_NO_WARNINGS")
    else:
        flags.append("-fPIC")
    if "__x86_64__" in macros:
        flags.append("-DNMFLOW_X86=1")
    return flags


def link_flags(macros: frozenset, folder: str) -> list:
    """Flags that make a shared library which needs no other one of the compiler on Windows."""
    if (
        "_MSC_VER" in macros
    ):  # lld comes with clang; the import library that it makes is not shipped
        return ["-shared", "-fuse-ld=lld", f"-Wl,-implib:{Path(folder) / '_native.lib'}"]
    if "_WIN32" in macros:
        return ["-shared"] if "__clang__" in macros else ["-shared", "-static"]
    return ["-shared", "-pthread"]


def sources() -> list:
    """Every file of csrc, relative to setup.py."""
    return sorted(p.relative_to(HERE).as_posix() for p in (HERE / "csrc").rglob("*.cpp"))


def run(command: list, kind: type) -> None:
    """Run the compiler; what it says of a failure is the error's text."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"it ended with {done.returncode}"
        raise kind(f"{' '.join(command)}\n{said[-2000:]}")


class BuildNative(build_ext):
    """Build `nmflow/_native.so`, or leave it out with a notice."""

    def get_ext_filename(self, fullname):
        """Drop Python's suffix: the library serves any Python on this platform."""
        try:
            windows = "_WIN32" in compiler()[1]
        except FAILURES:
            windows = os.name == "nt"
        return os.path.join(*fullname.split(".")) + (".dll" if windows else ".so")

    def run(self):
        """Build; any failure of the compiler means an install without the library."""
        if WANTED == "none":
            self._leave_out()
            return
        try:
            super().run()
        except FAILURES as error:
            if WANTED == "required":
                raise
            self._leave_out()
            install = (
                "LLVM's clang and the C++ build tools of Visual Studio"
                if os.name == "nt"
                else "GCC or clang"
            )
            sys.stderr.write(
                f"nmflow: the native library was not built ({type(error).__name__}: {error}); "
                f"the package works without it, slower. To get it, install {install} (or set "
                "CXX) and reinstall with --no-cache-dir.\n"
            )

    def _leave_out(self):
        # A library left from an earlier build would belong to other sources.
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        self.extensions = []
        self.distribution.ext_modules = []

    def build_extension(self, ext):
        """Compile each file with the flags of its own target, then link them."""
        command, macros = compiler()
        flags = [*compile_flags(macros), *(f"-I{path}" for path in ext.include_dirs)]
        extra = os.environ.get("NMFLOW_CXXFLAGS", "").split()
        wanted = [s for s in ext.sources if "__x86_64__" in macros or not target_flags(s)]

        def compiled(source):
            made = Path(self.build_temp, source).with_suffix(".o")
            made.parent.mkdir(parents=True, exist_ok=True)
            own = [*flags, *target_flags(source), *extra]
            run([*command, *own, "-c", source, "-o", str(made)], CompileError)
            return str(made)

        objects = []
        # The newest targets first: the others must know whether they are there.
        newest = [name for name in wanted if Path(name).stem.endswith(NEWEST)]
        try:
            objects += [compiled(name) for name in newest]
            flags.append("-DNMFLOW_TILES_BUILT=1")
        except CompileError as error:
            objects.clear()
            self.announce(f"left out: {error}", level=2)
        rest = [name for name in wanted if name not in newest]
        with ThreadPoolExecutor(self.parallel or min(8, os.cpu_count() or 1)) as pool:
            objects += pool.map(compiled, rest)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        link = [*link_flags(macros, self.build_temp), *extra]
        run([*command, *objects, "-o", str(library), *link], LinkError)


class PlatformWheel(bdist_wheel):
    """A wheel of a platform and of every Python 3, or of every platform without the library."""

    def get_tag(self):
        """`py3-none-linux_x86_64`, or `py3-none-any`."""
        if not self.distribution.has_ext_modules():
            return "py3", "none", "any"
        # One architecture is compiled, also where Python itself has two.
        place = super().get_tag()[2].replace("universal2", platform.machine())
        return "py3", "none", place


setup(
    ext_modules=[
        Extension(
            "nmflow._native",
            sources=sources(),
            include_dirs=[
                f"csrc/{folder}"
                for folder in ("common", "masks", "matmul", "int8", "steps", "tiles")
            ],
            depends=sorted(p.relative_to(HERE).as_posix() for p in (HERE / "csrc").rglob("*.h")),
            language="c++",
        )
    ],
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildNative},
)
