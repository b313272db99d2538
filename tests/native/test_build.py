"""What setup.py asks of a compiler, by what its macros say: one that only notes its calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nmflow import native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = """#!/bin/sh
case " $* " in
*" -dM "*) for name in {macros}; do echo "#define $name 1"; done; exit ;;
*{old}*) echo "error: unknown target" >&2; exit 1 ;;
esac
printf '%s\\n' "$@" > {log}/$$
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
GCC = "__GNUC__ __x86_64__ __linux__"
CLANG = "__GNUC__ __clang__"
MSVC = f"{CLANG} __x86_64__ _WIN32 _MSC_VER"


def build(folder: Path, macros: str, name: str = "cxx", old: str = "%", **environment: str):
    """The calls that compile, the one that links, the library's name, and what was said."""
    compiler, log = folder / name, folder / "log"
    log.mkdir(exist_ok=True)
    compiler.write_text(COMPILER.format(log=log, macros=macros, old=old))
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CXX": str(compiler), "NMFLOW_BUILD": "required"} | environment,
    )  # fmt: skip
    calls = [file.read_text().splitlines() for file in log.iterdir()]
    made = [file.name for file in (folder / "lib").rglob("_native.*")]
    compiled = [call for call in calls if "-c" in call]
    return compiled, [c for c in calls if "-shared" in c], made, done


@pytest.mark.parametrize(
    ("macros", "library", "x86", "flags", "link"),
    [
        (GCC, "_native.so", True, {"-fPIC", "-fvect-cost-model=dynamic"}, {"-pthread"}),
        (f"{CLANG} __aarch64__ __APPLE__", "_native.so", False, {"-fPIC"}, {"-pthread"}),
        (MSVC, "_native.dll", True, {"-D_CRT_SECURE_NO_WARNINGS"}, {"-fuse-ld=lld"}),
        (f"{CLANG} __x86_64__ _WIN32", "_native.dll", True, {"-D_CRT_SECURE_NO_WARNINGS"}, set()),
        ("__GNUC__ __x86_64__ _WIN32", "_native.dll", True, set(), {"-static"}),
    ],
    ids=["gcc", "macOS", "clang with MSVC", "clang with MinGW", "gcc of MinGW"],
)
def test_flags_are_those_of_the_target(tmp_path, macros, library, x86, flags, link):
    compiled, (linked,), made, done = build(tmp_path, macros)
    assert done.returncode == 0, done.stderr
    assert made == [library]
    assert {"-shared"} | link <= set(linked)
    sources = {call[call.index("-c") + 1] for call in compiled}
    assert any("_avx512" in name for name in sources) == x86
    assert "csrc/common/abi.cpp" in sources
    for call in compiled:
        assert flags <= set(call)
        assert ("-fPIC" in call) == ("_WIN32" not in macros)
        assert ("-DNMFLOW_X86=1" in call) == x86
        assert ("-mavx512f" in call) == any(
            f"_{isa}" in call[-3] for isa in ("avx512", "vnni", "bf16", "amx")
        )
    assert len({call[-1] for call in compiled}) == len(compiled)  # an object each
    if "_MSC_VER" in macros:  # its import library is not shipped
        (kept,) = (word for word in linked if "implib" in word)
        assert str(tmp_path / "temp") in kept


@pytest.mark.parametrize("old", ["amx.cpp", "%"])
def test_a_compiler_that_knows_no_amx_builds_all_else(tmp_path, old):
    compiled, (linked,), made, done = build(tmp_path, GCC, old=old)
    assert done.returncode == 0, done.stderr
    assert made == ["_native.so"]
    knows = old == "%"
    assert any("-DNMFLOW_TILES_BUILT=1" in call for call in compiled) == knows
    assert any("tiles_amx" in word for word in linked) == knows
    assert any("emulated_bf16" in word for word in linked) == knows


def test_clang_cl_is_driven_as_clang(tmp_path):
    compiled, links, made, done = build(tmp_path, MSVC, name="clang-cl")
    assert done.returncode == 0, done.stderr
    assert made == ["_native.dll"]
    assert all(call[0] == "--driver-mode=g++" for call in compiled + links)


def test_a_compiler_of_another_kind_is_named(tmp_path):
    *_, made, done = build(tmp_path, "_MSC_VER", name="cl")
    assert done.returncode != 0
    assert "is no GCC or clang" in done.stderr
    assert made == []
    *_, made, done = build(tmp_path, "_MSC_VER", name="cl", NMFLOW_BUILD="optional")
    assert done.returncode == 0
    assert "the package works without it, slower" in done.stderr


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_the_cpu_has_what_the_library_found():
    if not native.available():
        pytest.skip(native.why_not())
    text = Path("/proc/cpuinfo").read_text()
    flags = set(text.partition("\nflags")[2].partition("\n")[0].split())
    assert ("avx2" in native.features()) == ({"avx2", "fma", "f16c"} <= flags)
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert ("avx512" in native.features()) == (wide <= flags)
    assert ("avx512_bf16" in native.features()) == (wide | {"avx512_bf16"} <= flags)
    assert ("avx512_vnni" in native.features()) == (wide | {"avx512_vnni", "avx512vbmi"} <= flags)
