"""Everything that needs a GPU, in eight minutes: `make test-gpu`, or `python scripts/test_gpu.py`.

Each part runs on its own, within its seconds; what fails or takes too long does not stop the next.
What a part says goes to `build/gpu/NAME.log`, rows of the tables to `build/gpu/tables.csv`, and a
summary to `build/gpu/summary.txt`. The folder can be another: `--output`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=-ra"]
BENCH = ["benchmarks/gpu.py"]


def parts(tables: Path) -> list[tuple[str, int, list[str]]]:
    """Names, seconds and arguments for Python, what matters most first."""
    rows = ["--csv", str(tables)]
    found = [
        ("products", 100, [*PYTEST, "tests/native/test_gpu_device.py"]),
        ("decode", 110, [*BENCH, "decode", "--seconds", "95", *rows]),
        ("masks", 40, [*PYTEST, "tests/native/test_gpu_kernel.py", "-x"]),
        ("steps", 50, ["benchmarks/overhead.py", "--device", "cuda", "--layers", "12", "--tokens",
                       "3152", "--amp", "--fused", "--csv", str(tables.with_name("steps.csv"))]),
        ("panels", 50, [*BENCH, "panels", "--seconds", "40", *rows]),
        ("llama", 70, [*BENCH, "llama", "--seconds", "70", *rows]),
        ("search", 40, [*BENCH, "decode", "--search", "--seconds", "30", *rows]),
        ("training", 60, [*PYTEST, "tests/flow/test_cuda.py", "-x"]),
    ]  # fmt: skip
    return found


def run(name: str, seconds: float, command: list[str], output: Path) -> str:
    """Run one part; a line for the summary."""
    start = time.monotonic()
    paths = [str(ROOT / "src"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    environment.pop("TRITON_INTERPRET", None)
    with (output / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
            ended = "ok" if code == 0 else f"failed ({code})"
        except (subprocess.TimeoutExpired, OSError) as error:
            ended = f"stopped ({type(error).__name__})"
    last = (output / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
    return f"{name}: {ended} in {time.monotonic() - start:.0f} s; {' '.join(last)[:200]}"


def main() -> int:
    """Run every part within the time that is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    python, tables = sys.executable, output / "tables.csv"
    todo = [(name, seconds, [python, *rest]) for name, seconds, rest in parts(tables)]
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            check = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, *BENCH, "check"]
            todo.insert(2, (tool, 40, check))
    else:
        todo.insert(2, ("check", 30, [python, *BENCH, "check"]))
    facts = "import torch; print(torch.__version__, torch.cuda.get_device_properties(0))"
    todo.insert(0, ("facts", 20, [python, "-c", facts]))
    failed = 0
    with (output / "summary.txt").open("w") as summary:
        for name, seconds, command in todo:
            left = end - time.monotonic()
            line = f"{name}: no time left"
            if left > 5:
                line = run(name, min(seconds, left), command, output)
            failed += ": ok" not in line
            for stream in (summary, sys.stdout):
                stream.write(line + "\n")
                stream.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
