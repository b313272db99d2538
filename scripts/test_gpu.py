"""Everything that needs a GPU, in eight minutes: `make test-gpu`, or `python scripts/test_gpu.py`.

What only checks runs first, all at once: tests of products, masks and training, each in several
processes, compute-sanitizer's tools, and the compilers of what is timed after them. Then tables are
measured, alone. Each part has its seconds; what fails or takes too long does not stop the others.
Results are files in `build/gpu`, or the folder that `--output` names: `summary.txt`, `checks.log`
(what every check said), `failures.log` (failures as they came), `tables.csv` and `tables.log`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short",
          "-p", "told_at_once", "-o", "addopts=-rfE"]  # fmt: skip
BENCH = ["benchmarks/gpu.py"]
SANITIZER = ("memcheck", "racecheck", "initcheck", "synccheck")
SHARE = 0.45  # of the time, at most, for what only checks


def tests(name: str, workers: int, *files: str) -> tuple[str, list[str]]:
    """Test files in so many processes: what kills one leaves the others' answers."""
    return name, [*PYTEST, "-n", str(workers), "--dist", "worksteal", *files]


def checks(kernels: Path, seconds: float, cores: int, sample: int) -> list[tuple[str, list[str]]]:
    """Names and arguments for Python of what runs at once."""
    few = max(1, cores // 4)
    kept = ["--kernels", str(kernels), "--seconds", str(seconds - 12)]
    return [
        tests("products", few, "tests/native/test_gpu_device.py"),
        tests("panels", 1, "tests/native/test_gpu_panels.py"),
        tests("steps", few, "tests/native/test_gpu_steps.py"),
        tests("masks", 1, "--every", str(sample), "tests/native/test_gpu_kernel.py"),
        tests("training", few, "--every", str(sample), "tests/flow/test_cuda.py"),
        ("compile", [*BENCH, "compile", "--search", "--workers", str(max(2, cores // 2)), *kept]),
        ("warm", [*BENCH, "warm", "--workers", str(few), "--seconds", str(seconds - 15)]),
    ]


class Part:
    """A process with a log, and a line on how it ended."""

    def __init__(self, name: str, command: list[str], seconds: float, output: Path, **more: str):
        self.name, self.start, self.seconds = name, time.monotonic(), seconds
        self.log = output / f"{name}.log"
        paths = [str(ROOT / "src"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "TOLD_AT_ONCE": str(output / "failures.log"),
            **more,
        }
        environment.pop("TRITON_INTERPRET", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> str:
        """A line for the summary, at the end of the process or of its seconds."""
        ended = "stopped"
        try:
            code = self.process.wait(max(0.1, self.start + self.seconds - time.monotonic()))
            ended = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)  # pytest sums up what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(4)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its children, too
        said = self.log.read_text(errors="replace").strip().splitlines()
        counts = [line for line in said if re.search(r"\d+ (passed|failed|error)", line)]
        last = " ".join((counts or said)[-1:])[:200]
        return f"{self.name}: {ended} in {time.monotonic() - self.start:.0f} s; {last}"


def main() -> int:
    """Run every part within the time that is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--every", type=int, default=3, help="of tests of masks and training run one in so many"
    )
    parser.add_argument("--only", choices=["checks", "tables"])
    args = parser.parse_args()
    output = args.output.resolve()
    logs = output / "parts"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    for name in ("failures.log", "tables.csv"):
        (output / name).unlink(missing_ok=True)
    begin, python = time.monotonic(), sys.executable
    end = begin + 60 * args.minutes - 4
    kernels, failed = logs / "kernels", 0
    summary = (output / "summary.txt").open("w")

    def tell(line: str) -> None:
        nonlocal failed
        failed += ": ok" not in line
        for stream in (summary, sys.stdout):
            stream.write(f"{time.monotonic() - begin:4.0f} s  {line}\n")
            stream.flush()

    if args.only != "tables":
        seconds = (end - begin) * (1.0 if args.only else SHARE)
        facts = "import torch; print(torch.__version__, torch.cuda.get_device_properties(0))"
        more = checks(kernels, seconds, os.cpu_count() or 2, args.every)
        todo = [("facts", ["-c", facts]), *more]
        running = [Part(name, [python, *rest], seconds, logs) for name, rest in todo]
        check = [python, *BENCH, "check"]
        sanitizer = shutil.which("compute-sanitizer")
        for tool in SANITIZER if sanitizer else ():
            command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *check]
            # Each tensor has memory of its own, so that what lies beyond its end is nobody's.
            running.append(Part(tool, command, seconds, logs, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
        if not sanitizer:
            running.append(Part("check", check, seconds, logs))
        for part in running:
            tell(part.wait())
        with (output / "checks.log").open("w") as log:
            for part in running:
                log.write(f"=== {part.name}\n{part.log.read_text(errors='replace')}\n")
        if (logs / "failures.log").exists():
            shutil.copy(logs / "failures.log", output)
    if args.only != "checks":
        left = end - time.monotonic()
        command = [python, *BENCH, "tables", "--search", "--csv", str(output / "tables.csv")]
        command += ["--seconds", str(left - 12), "--kernels", str(kernels)]
        part = Part("tables", command, left, logs)
        tell(part.wait())
        shutil.copy(part.log, output)
    summary.close()
    shutil.rmtree(logs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
