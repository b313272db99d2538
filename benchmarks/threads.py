"""How much faster two threads are than one on a packed layer; needs two idle cores.

python benchmarks/threads.py --csv threads.csv
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from _timing import facts, interleaved, write_csv
from kernels import PATTERNS, SHAPES, pack, sparse
from nmflow.kernels import ops
from nmflow.pattern import Pattern

GOAL = 1.8  # from 197 tokens on


def on_threads(count: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run a call on this many threads of torch's."""
    torch.set_num_threads(count)
    return call()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 197, 1024])
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for out, inputs in SHAPES:
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs)
            for spec in PATTERNS:
                p = Pattern(spec)
                values, codes, _ = pack(sparse(out, inputs, p, x.dtype), p)
                numbers = (out, inputs, p.n, p.m, p.panel)
                call = functools.partial(ops.matmul, x, values, codes, None, numbers)
                calls = {str(n): functools.partial(on_threads, n, call) for n in (1, 2)}
                times = interleaved(calls, args.seconds)
                ratio = times["1"].median / times["2"].median
                goal = GOAL if tokens >= 197 else ""
                rows.append(
                    {
                        **{"out": out, "in": inputs, "tokens": tokens, "pattern": spec},
                        **{f"median_ms_{n}": round(t.median * 1e3, 4) for n, t in times.items()},
                        **{"q10_ms_2": round(times["2"].low * 1e3, 4)},
                        **{"q90_ms_2": round(times["2"].high * 1e3, 4), "times": round(ratio, 2)},
                        **{"goal": goal, "reached": "" if not goal else ratio >= GOAL, **facts()},
                    }
                )
                print(f"({out}, {inputs}) T={tokens:4} {spec:5} {ratio:.2f} x, goal {goal}")
    print("\n" + ", ".join(f"{k}: {v}" for k, v in facts().items()))
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
