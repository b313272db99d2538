"""Packed products on a GPU against cuBLAS: microseconds in CUDA graphs, weights past the L2.

    python benchmarks/gpu.py tables [--search] [--seconds 90] [--csv FILE] [--kernels FOLDER]
    python benchmarks/gpu.py decode ready panels llama roof steps int8 three train [--seconds 90] …
    python benchmarks/gpu.py check
    python benchmarks/gpu.py compile --kernels FOLDER [--search] [--workers 8] [--seconds 60]
    python benchmarks/gpu.py warm [--workers 4] [--seconds 60]

`decode` is products of up to 64 tokens, `ready` those of 16 and more by warp groups whose x is put
in order first, `panels` of many, `llama` tokens a second of a network of the shape of Llama-2-7B
with random weights and 1:8 in every linear layer, `steps` training steps that are bound by
launches, `roof` what memory gives to a copy. `int8` is products with 8-bit values, `three` the
products of a training step on panels, `train` whole steps of networks in their sparse phase.
`tables` is all of them in one process. With `--search` other plans than the one that is taken are
timed too, last, to judge `gpu_cuts.plan` and `gpu_panels.block`. `check` runs a few small products
once, for compute-sanitizer. `compile` compiles the kernels of `decode` on many cores and needs no
GPU, `warm` those in Triton of `panels`, `three` and `train`. Rows are written as they are found,
and a run ends with its seconds, so that nothing is lost.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import _gpu
import _gpu_check
import _gpu_compile
import _gpu_decode
import _gpu_int8
import _gpu_panels
import _gpu_steps
import _gpu_whole
from _gpu import Row

PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "decode": _gpu_decode.decode, "ready": _gpu_decode.ready, "panels": _gpu_panels.panels,
    "llama": _gpu_whole.llama, "roof": _gpu_whole.roof, "steps": _gpu_whole.steps,
    "int8": _gpu_int8.products, "three": _gpu_steps.products, "train": _gpu_steps.networks,
    "check": _gpu_check.check,
}  # fmt: skip
TABLES = ["roof", "decode", "ready", "int8", "panels", "three", "train", "steps", "llama"]
LATER = 25.0  # seconds that a search leaves to the network


def best_of(rows: list[Row]) -> Iterator[str]:
    """A line for each product that was searched: the best plan beside the taken one."""
    products: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "failed" not in row and row["what"] in ("search", "panels-search"):
            key = tuple(row[k] for k in ("what", "out", "inputs", "tokens", "pattern"))
            products.setdefault(key, []).append(row)
    for key, found in products.items():
        best = max(found, key=lambda one: one["ratio"])
        taken = next((f"{one['ratio']:.2f}" for one in found if one["taken"]), "-")
        yield f"{key}: best {best['ratio']:.2f}, taken {taken}, of {len(found)}: {best['plan']}"


def order(names: list[str], search: bool) -> list[tuple[str, bool]]:
    """Parts, and whether each is a search; the network then takes the fastest plans."""
    todo = [(name, False) for name in names]
    if not search:
        return todo
    last = [(name, False) for name in ("llama", "steps") if name in names]
    found = [(name, True) for name in ("panels", "decode") if name in names]
    return [one for one in todo if one not in last] + found + last


def measure(names: list[str], search: bool, seconds: float, csv_file: Path | None) -> int:
    """Run parts, row by row, and return how many raised; the next one follows each that did."""
    begin, failed = time.monotonic(), 0
    there = torch.cuda.is_available()
    where = {"device": torch.cuda.get_device_name() if there else "", "torch": torch.__version__}
    file = csv_file.open("a", newline="") if csv_file else None
    writer = csv.DictWriter(file, _gpu.FIELDS) if file else None
    if writer and file and not file.tell():
        writer.writeheader()
    rows: list[Row] = []
    for name, searched in order(names, search):
        print(f"--- {name}{', searched' * searched}, {time.monotonic() - begin:.0f} s", flush=True)
        try:
            for row in PARTS[name](searched):
                rows.append(row)
                short = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                print(*(f"{k}={v}" for k, v in short.items()), flush=True)
                if writer and file:
                    writer.writerow({**short, **where})
                    file.flush()
                if time.monotonic() > begin + seconds - LATER * searched:
                    print(f"stopped after {time.monotonic() - begin:.0f} seconds", flush=True)
                    break
        except Exception:  # noqa: BLE001 -- the other parts are worth their time
            failed += 1
            print(traceback.format_exc(), flush=True)
            print(f"{name} failed", flush=True)
    if file:
        file.close()
    print(*best_of(rows), sep="\n", flush=True)
    return failed


def main() -> int:
    """Run some parts, row by row; the number of those that raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "tables", "compile", "warm"])
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--kernels", type=Path, help="a folder of compiled kernels")
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    if args.kernels:
        _gpu.keep_kernels(args.kernels)
    if args.parts == ["compile"]:
        _gpu_compile.compile_all(args.search, args.workers, args.seconds)
        return 0
    if args.parts == ["warm"]:
        return _gpu_compile.warm_all(args.workers, args.seconds)
    names = TABLES if args.parts == ["tables"] else args.parts
    if alone := [name for name in names if name not in PARTS]:
        parser.error(f"{alone[0]} is a run of its own")
    return measure(names, args.search, args.seconds, args.csv)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
