"""From what `make test-gpu` measured: the cuts that `gpu_cuts` takes, and the tables of a page.

    python scripts/gpu_page.py docs/benchmarks/data/gpu-h200{,-2}.csv [--check]

Files are runs, the oldest first. Writes `src/nmflow/kernels/cuda/cuts.csv` and what stands between
the markers of `docs/benchmarks/gpu.md`. With `--check` it writes nothing, and fails where they
would change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_rows import cuts_file, kept, read
from gpu_tables import tables

ROOT = Path(__file__).resolve().parents[1]
CUTS = ROOT / "src/nmflow/kernels/cuda/cuts.csv"
PAGE = ROOT / "docs/benchmarks/gpu.md"


def page(text: str, parts: list[str]) -> str:
    """The page with each part between its markers."""
    for i, part in enumerate(parts):
        begin, end = f"<!-- table {i} -->", f"<!-- end {i} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Write both, or compare: the number of files that are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    rows = read(*args.csv)
    new = {CUTS: cuts_file(kept(rows))}
    if not args.check:
        CUTS.write_text(new[CUTS])
    new[PAGE] = page(PAGE.read_text(), list(tables(rows)))
    if not args.check:
        PAGE.write_text(new[PAGE])
    stale = [str(path) for path, text in new.items() if path.read_text() != text]
    print(*(f"{path} is not what the runs give" for path in stale), sep="\n")
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
