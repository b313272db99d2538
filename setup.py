"""Build the optional native library; pyproject.toml says everything else.

The library is a plain C ABI loaded with ctypes, so it links to neither Python nor torch: one wheel
serves every Python on a platform. Where it cannot be built (no compiler, or one that fails) the
package installs without it and says so once; pure torch then serves every call, slower and just as
right. `NMFLOW_BUILD=required` makes that an error, for whoever makes wheels; `NMFLOW_BUILD=none`
leaves the library out, for the wheel of every other platform.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path
from shutil import which

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import (
    BaseError,
    CCompilerError,
    CompileError,
    LinkError,
    PlatformError,
)

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
]
# What only one compiler knows. MSVC is not among them: the sources use GCC's vector extension.
COMPILERS = {"gcc": ["-fvect-cost-model=dynamic"], "clang": []}
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
# Left out, alone, where the compiler is too old to know it.
TARGETS["amx"] = [*TARGETS["avx512"], "-mamx-tile", "-mamx-bf16"]
FAILURES = (BaseError, CCompilerError, CompileError, LinkError, OSError)
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def kind_of(cxx: list) -> str:
    """Which of `COMPILERS` the command is, by the macros that it defines."""
    asked = [*cxx, "-dM", "-E", "-x", "c++", os.devnull]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    if said.returncode:
        raise PlatformError(f"{' '.join(cxx)} does not run: {said.stderr.strip()[:200]}")
    return "clang" if "__clang__" in said.stdout else "gcc"


def target_flags(source: str) -> list:
    """Flags for one file, by its name: `*_avx2.cpp`, `*_avx512.cpp`, or none."""
    stem = Path(source).stem
    flags = [flag for name, flags in TARGETS.items() if stem.endswith("_" + name) for flag in flags]
    return flags


def sources() -> list:
    """Every file of csrc that this machine's architecture can use, relative to setup.py."""
    found = sorted(p.relative_to(HERE).as_posix() for p in (HERE / "csrc").rglob("*.cpp"))
    return [name for name in found if IS_X86 or not target_flags(name)]


class BuildNative(build_ext):
    """Build `nmflow/_native.so`, or leave it out with a notice."""

    def get_ext_filename(self, fullname):
        """Drop Python's suffix: the library serves any Python on this platform."""
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        """No `PyInit_`: this is not a Python module."""
        return ext.export_symbols

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
            sys.stderr.write(
                f"nmflow: the native library was not built ({type(error).__name__}: {error}); "
                "the package works without it, slower. To get it, install GCC or clang (or set "
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
        if self.compiler.compiler_type != "unix":
            raise PlatformError(
                f"the compiler is {self.compiler.compiler_type!r}, and the sources need GCC or "
                "clang on Linux or macOS"
            )
        # The C compiler object of setuptools runs `CC` on C++ too; CXX is what a user sets.
        cxx = os.environ.get("CXX", "").split()
        cxx = cxx or [next((c for c in ("c++", "g++", "clang++") if which(c)), "c++")]
        flags = [*COMMON, *COMPILERS[kind_of(cxx)]]
        self.compiler.set_executables(
            compiler_so=[*cxx, "-fPIC"],
            compiler_so_cxx=[*cxx, "-fPIC"],
            compiler_cxx=cxx,
            linker_so=[*cxx, "-shared"],
            linker_so_cxx=[*cxx, "-shared"],
            linker_exe_cxx=cxx,
        )
        macros: list = [("NDEBUG", None)] + ([("NMFLOW_X86", "1")] if IS_X86 else [])
        extra = os.environ.get("NMFLOW_CXXFLAGS", "").split()
        objects = []
        # The optional target first: the others must know whether it is there.
        for source in sorted(ext.sources, key=lambda name: "_amx" not in name):
            try:
                objects += self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    macros=macros,
                    include_dirs=ext.include_dirs,
                    depends=ext.depends,
                    extra_postargs=[*flags, *target_flags(source), *extra],
                )
            except FAILURES:
                if "_amx" not in source:
                    raise
                continue
            if "_amx" in source:
                macros.append(("NMFLOW_AMX", "1"))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *extra],
            build_temp=self.build_temp,
            target_lang="c++",
        )


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
            include_dirs=["csrc/common", "csrc/masks", "csrc/matmul", "csrc/int8"],
            depends=sorted(p.relative_to(HERE).as_posix() for p in (HERE / "csrc").rglob("*.h")),
            language="c++",
        )
    ],
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildNative},
)
