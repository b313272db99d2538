"""Build the optional native library; pyproject.toml says everything else.

The library is a plain C ABI loaded with ctypes, so it links to neither Python nor torch. Where it
cannot be built (no compiler, or one that fails) the package installs without it and says so once;
pure torch then serves every call, slower and just as right.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import (
    BaseError,
    CCompilerError,
    CompileError,
    LinkError,
    PlatformError,
)

HERE = Path(__file__).resolve().parent
COMMON = [
    "-std=c++17",
    # -O2, not -O3: GCC 12 at -O3 has miscompiled tie handling in loops like those of the masks.
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
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
# Left out, alone, where the compiler is too old to know it.
TARGETS["amx"] = [*TARGETS["avx512"], "-mamx-tile", "-mamx-bf16"]
FAILURES = (BaseError, CCompilerError, CompileError, LinkError, OSError)
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


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
        try:
            super().run()
        except FAILURES as error:
            # A library left from an earlier build would belong to other sources.
            for ext in self.extensions:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.extensions = []
            self.distribution.ext_modules = []
            sys.stderr.write(
                f"nmflow: the native library was not built ({type(error).__name__}: {error}); "
                "the package works without it, slower. Install a C++17 compiler (or set CXX) and "
                "reinstall to get it.\n"
            )

    def build_extension(self, ext):
        """Compile each file with the flags of its own target, then link them."""
        # The C compiler object of setuptools runs `CC` on C++ too; CXX is what a user sets.
        cxx = os.environ.get("CXX", "").split()
        if hasattr(self.compiler, "compiler_so") and self.compiler.compiler_type == "unix":
            if not cxx:
                from shutil import which

                cxx = [next((c for c in ("c++", "g++", "clang++") if which(c)), "c++")]
            self.compiler.set_executables(
                compiler_so=[*cxx, "-fPIC"],
                compiler_so_cxx=[*cxx, "-fPIC"],
                compiler_cxx=cxx,
                linker_so=[*cxx, "-shared"],
                linker_so_cxx=[*cxx, "-shared"],
                linker_exe_cxx=cxx,
            )
        else:
            raise PlatformError(f"compiler type {self.compiler.compiler_type} is not supported")
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
                    extra_postargs=[*COMMON, *target_flags(source), *extra],
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


setup(
    ext_modules=[
        Extension(
            "nmflow._native",
            sources=sources(),
            include_dirs=["csrc/common", "csrc/masks", "csrc/matmul"],
            depends=sorted(p.relative_to(HERE).as_posix() for p in (HERE / "csrc").rglob("*.h")),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
