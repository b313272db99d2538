"""Test nmflow at the ends of the versions that pyproject.toml declares; write docs/versions.md.

    python scripts/test_versions.py [--only NAME] [--clean]

Each environment is made once, in .cache/versions, out of one wheel of this checkout: the library is
of a platform, not of a Python. `oldest` has each dependency at the very floor that is declared.
Variables: NMFLOW_PYTHON_3_10 (and so on) names an interpreter that is not on the path;
NMFLOW_TORCH_INDEX is the address of an index with CPU builds of torch, for an ordinary machine,
which else takes CUDA builds of several GB.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "versions"
PAGE = ROOT / "docs" / "versions.md"
EXTRAS = ("cli", "experiments", "lightning", "onnx")
TOOLS = ("pytest", "hypothesis", "triton")
SHOWN = ("torch", "transformers", "numpy")
# Where nmflow meets other packages: torch's optimizers, compiler and exporters, Hugging Face's and
# Lightning's trainers, ONNX, Triton's interpreter, the command line.
TESTS = {
    "flow": ("callback", "contract", "flow", "flow_amp", "flow_compile", "lightning", "resume"),
    "packed": ("compress", "export", "files", "ops"),
    "experiments": ("catalog", "cli", "runs", "systems", "tasks"),
    "native": ("native",),
    "unit": ("import", "targets"),
}
HEAD = """# The versions that are tested

`make test-versions` makes these environments, runs the tests that involve other packages in each,
on CPUs, and writes this page. `oldest` has every dependency at the lowest version that
`pyproject.toml` allows.
"""


@dataclass(frozen=True)
class Environment:
    """A Python, and what is pinned in it; whatever is not is the newest."""

    name: str
    python: str
    pins: tuple[str, ...] = ()
    floors: bool = False

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return CACHE / self.name

    @property
    def interpreter(self) -> str:
        """Its Python."""
        return str(self.folder / "bin" / "python")


ENVIRONMENTS = (
    Environment("oldest", "3.10", floors=True),
    Environment("old-torch", "3.11", ("torch==2.6.*",)),
    Environment("newest", "3.13"),
)


@dataclass(frozen=True)
class Result:
    """What the tests of one environment came to."""

    environment: Environment
    versions: dict[str, str]
    counts: Counter[str]
    reasons: dict[str, list[str]]

    @property
    def good(self) -> bool:
        """Whether tests ran and none failed."""
        return self.counts["passed"] > 0 and not self.counts["failed"]


def main() -> int:
    """Make the environments, run the tests, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", choices=names, help="one environment; the page stays as it is")
    parser.add_argument("--clean", action="store_true", help="remove the environments, and no more")
    asked = parser.parse_args()
    if asked.clean:
        shutil.rmtree(CACHE, ignore_errors=True)
        return 0
    wheel = build()
    chosen = [e for e in ENVIRONMENTS if asked.only in (None, e.name)]
    results = []
    for environment in chosen:
        make(environment, wheel)
        results.append(test(environment))
        print(row(results[-1]), flush=True)
        for reason in results[-1].reasons["failed"]:
            print(f"  failed: {reason}", flush=True)
    if not asked.only:
        PAGE.write_text(page(results), encoding="utf-8")
    return 0 if all(result.good for result in results) else 1


def build() -> Path:
    """One wheel of the checkout, for every environment."""
    place = CACHE / "wheel"
    shutil.rmtree(place, ignore_errors=True)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(ROOT)]
    run(sys.executable, *command)
    (wheel,) = place.glob("*.whl")
    return wheel


def make(environment: Environment, wheel: Path) -> None:
    """Make the environment, unless it is there as asked, and install the wheel."""
    wanted, constraints = requirements(environment, wheel)
    stamp, lines = environment.folder / "made-of.txt", [*wanted, "with", *constraints]
    if not stamp.exists() or stamp.read_text().splitlines() != lines:
        shutil.rmtree(environment.folder, ignore_errors=True)
        run(interpreter(environment.python), "-m", "venv", str(environment.folder))
        limits = environment.folder / "constraints.txt"
        limits.write_text("\n".join(constraints) + "\n")
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(limits)]
        index = os.environ.get("NMFLOW_TORCH_INDEX")
        torch = ["--index-url", index, "torch"] if index else ["torch"]
        run(environment.interpreter, *install, *torch)
        run(environment.interpreter, *install, *wanted)
        stamp.write_text("\n".join(lines) + "\n")
    again = ["--quiet", "--no-deps", "--force-reinstall"]
    run(environment.interpreter, "-m", "pip", "install", *again, str(wheel))


def requirements(environment: Environment, wheel: Path) -> tuple[list[str], list[str]]:
    """What to install, as the wheel declares it, and the constraints of the environment."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        declared = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    found = {}
    for requirement in map(Requirement, declared):
        marker = requirement.marker
        if requirement.name == "nmflow":
            continue
        if (
            marker is None
            or any(marker.evaluate({"extra": extra}) for extra in EXTRAS)
            or (requirement.name in TOOLS and marker.evaluate({"extra": "dev"}))
        ):
            found[requirement.name] = str(requirement).partition(";")[0].strip()
    floors = [floor(text) for text in found.values()] if environment.floors else []
    return sorted(found.values()), [*environment.pins, *sorted(floors)]


def floor(text: str) -> str:
    """The newest patch of the oldest release.

    >>> floor("torch>=2.6"), floor("typer>=0.15.4")
    ('torch==2.6.*', 'typer==0.15.4')
    """
    name, version = text.split(">=")
    return f"{name}=={version}" + (".*" if version.count(".") < 2 else "")


def interpreter(version: str) -> str:
    """The command of a Python: named by a variable, on the path, or pyenv's."""
    named = os.environ.get("NMFLOW_PYTHON_" + version.replace(".", "_"))
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    found = named or shutil.which(f"python{version}") or (str(pyenv[-1]) if pyenv else "")
    if not found:
        sys.exit(
            f"there is no Python {version} on the path: install it, or set "
            f"NMFLOW_PYTHON_{version.replace('.', '_')}"
        )
    return found


def test(environment: Environment) -> Result:
    """Run the tests in the environment, on the installed wheel, and count."""
    report = environment.folder / "report.xml"
    report.unlink(missing_ok=True)
    files = [f"tests/{room}/test_{name}.py" for room in TESTS for name in TESTS[room]]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    said = environment.folder / "pytest.log"
    with said.open("w") as log:
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run(
            [environment.interpreter, *command],
            cwd=ROOT, env=kept | own, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if not report.exists():
        sys.exit(f"pytest did not end in {environment.name}: see {said}")
    counts: Counter[str] = Counter()
    reasons: dict[str, list[str]] = {"failed": [], "skipped": []}
    for outcome, reason in outcomes(report):
        counts[outcome] += 1
        if reason and reason not in reasons[outcome]:
            reasons[outcome].append(reason)
    return Result(environment, versions(environment), counts, reasons)


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """What became of each test, and why it did not pass."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        failure = next((x for x in case if x.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if failure is not None:
            first = " ".join((failure.get("message") or "").split())[:160]
            yield "failed", f"`{name}`: {first}"
        elif skip is not None:
            yield "skipped", re.sub(r"^Skipped: ", "", skip.get("message") or "")
        else:
            yield "passed", ""


def versions(environment: Environment) -> dict[str, str]:
    """The installed versions of what the page shows."""
    code = f"""
import platform
from importlib.metadata import version
print("Python", platform.python_version())
for name in {SHOWN!r}:
    print(name, version(name).partition("+")[0])
"""
    said = run(environment.interpreter, "-c", code)
    return dict(line.split() for line in said.splitlines())


def row(result: Result) -> str:
    """One row of the page's table."""
    cells = [result.environment.name, *result.versions.values()]
    cells += [f"{result.counts[k]:,}" for k in ("passed", "failed", "skipped")]
    return "| " + " | ".join(cells) + " |"


def page(results: list[Result]) -> str:
    """The page: a table, and the reasons of what did not pass."""
    columns = ["environment", "Python", *SHOWN, "passed", "failed", "skipped"]
    lines = [HEAD, f"Written on {datetime.date.today()}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += [row(result) for result in results]
    for kind, words in (("failed", "What failed"), ("skipped", "Why tests were skipped")):
        rows = [f"- {r.environment.name}: {why}" for r in results for why in r.reasons[kind]]
        if rows:
            lines += ["", f"{words}:", "", *rows]
    return "\n".join(lines) + "\n"


def run(*command: str) -> str:
    """Run a command; what it says, or the end of it as an error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
