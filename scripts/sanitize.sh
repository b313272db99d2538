#!/bin/sh
# Build the native library with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its
# own, and run its tests on that build. Scratch memory is then allocated anew and to the byte, so
# that a kernel which leaves its share is seen. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
NMFLOW_CXXFLAGS="$flags" "$python" setup.py -q build_ext \
    --build-lib "$build/lib" --build-temp "$build/temp"
library="$(ls "$build"/lib/nmflow/_native.*)"
compiler="${CXX:-c++}"
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
# Python and torch never free all they hold; leaks of the library would be in its own tests' memory.
# GCC aligns the frames of detect_stack_use_after_return to 32 bytes and then moves 64-byte vectors to
# them as if aligned, which faults.
export ASAN_OPTIONS="detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=0"
export UBSAN_OPTIONS="print_stacktrace=1"
export NMFLOW_LIBRARY="$library"
"$python" -m pytest -q -p no:cacheprovider tests/native/test_native.py tests/native/test_cpu_kernels.py \
    tests/native/test_int8_kernels.py tests/native/test_hold.py tests/native/test_step_kernels.py \
    tests/native/test_tiles.py tests/native/test_tile_steps.py \
    tests/flow/test_kept_values.py tests/packed/test_memory_layouts.py "$@"
