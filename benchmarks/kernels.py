"""Packed products against the best dense way: the tables of the project's goals.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/kernels.py --csv kernels.csv
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 ... --dtype bfloat16    # bf16 without tile registers

Dense is the fastest of `F.linear`, oneDNN on the plain weight and oneDNN on its packed weight, in
the same turns as the packed layer, which is called through its torch op. See `_timing.py` for what
is a sample and where weights lie.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from _timing import copies_of, facts, interleaved, rotate, write_csv
from nmflow.kernels import Call, cpu, ops
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.pattern import Pattern

SHAPES = ((3072, 768), (768, 3072))
PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32")
GOALS = {
    "float32": {
        1: (2.0, 3.5, 6.5, 12, 14),
        16: (1.45, 2.9, 5.6, 11, 15),
        197: (1.4, 2.75, 5.4, 10.5, 14.5),
        1024: (1.5, 2.8, 5.3, 9.8, 14),
    },
    "bfloat16": dict.fromkeys((16, 197, 1024), (1.35, 2.65, 5.0, 9.5, 12.5)),
}


def sparse(out: int, inputs: int, pattern: Pattern, dtype: torch.dtype) -> torch.Tensor:
    """A random weight that holds the pattern."""
    score = torch.rand(-(-out // pattern.panel), inputs // pattern.m, pattern.m)
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(2, score.topk(pattern.n, 2).indices, True)
    kept = kept.flatten(1).repeat_interleave(pattern.panel, 0)[:out]
    return (torch.randn(out, inputs) * kept).to(dtype)


def dense_calls(x: torch.Tensor, w: torch.Tensor, cache: str) -> dict:
    """The three dense ways, each rotating through copies of its weight."""
    mkldnn, tokens = torch.ops.mkldnn, x.shape[0]
    weights = [w.clone() for _ in range(copies_of(w.nbytes, cache, tokens))]
    calls = {
        "F.linear": rotate([lambda w=w: F.linear(x, w) for w in weights]),
        "oneDNN": rotate(
            [lambda w=w: mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in weights]
        ),
    }
    packed = [mkldnn._reorder_linear_weight(w, tokens) for w in weights]
    calls["oneDNN packed"] = rotate(
        [lambda w=w: mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in packed]
    )
    return calls


def pack(w: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor, Shape]:
    """The tiled values and codes of a sparse weight, and its shape."""
    shape = Shape.of(w.shape[0], w.shape[1], pattern)
    return *tiled_from_canonical(*canonical_from_dense(w, shape), shape), shape


def packed_call(x: torch.Tensor, out: int, pattern: Pattern, cache: str) -> tuple:
    """The packed way through its op, the kernel that serves it, and the bytes of its weight."""
    values, codes, shape = pack(sparse(out, x.shape[1], pattern, x.dtype), pattern)
    numbers = (out, x.shape[1], pattern.n, pattern.m, pattern.panel)
    size = values.nbytes + codes.nbytes
    count = copies_of(size, cache, x.shape[0])
    weights = [(values.clone(), codes.clone()) for _ in range(count)]
    calls = [lambda a=a, b=b: ops.matmul(x, a, b, None, numbers) for a, b in weights]
    kernel = cpu.kernel(Call(shape, x.dtype, "cpu", x.shape[0])).split()[-1]
    return rotate(calls), (kernel, size)


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """All rows of one dtype, printed as they come."""
    dtype = getattr(torch, args.dtype)
    rows: list[dict[str, object]] = []
    where = facts()
    for out, inputs in SHAPES:
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs).to(dtype)
            calls = dense_calls(x, torch.randn(out, inputs).to(dtype), args.cache)
            weights = {}
            for spec in args.patterns:
                calls[spec], weights[spec] = packed_call(x, out, Pattern(spec), args.cache)
            times = interleaved(calls, args.seconds)
            best = min(("F.linear", "oneDNN", "oneDNN packed"), key=lambda k: times[k].median)
            dense = times[best]
            goals = GOALS.get(args.dtype, {}).get(tokens)
            for name, found in times.items():
                packed = weights.get(name)
                goal = goals[PATTERNS.index(name)] if goals and name in PATTERNS else None
                ratio = dense.median / found.median
                share = Pattern(name).density if packed else 1.0
                rows.append(
                    {
                        **{"out": out, "in": inputs, "dtype": args.dtype, "tokens": tokens},
                        **{"way": name, "kernel": packed[0] if packed else ""},
                        **{"median_ms": round(found.median * 1e3, 5)},
                        **{"q10_ms": round(found.low * 1e3, 5)},
                        **{"q90_ms": round(found.high * 1e3, 5), "samples": found.samples},
                        "gflops": round(2e-9 * tokens * out * inputs * share / found.median, 1),
                        "bytes_share": round(packed[1] / (out * inputs * dtype.itemsize), 4)
                        if packed
                        else 1.0,
                        **{"times_best_dense": round(ratio, 2), "goal": goal if goal else ""},
                        **{"reached": "" if goal is None else "yes" if ratio >= goal else "no"},
                        **{"best_dense": best, "cache": args.cache, **where},
                    }
                )
                mark = "" if goal is None else f" goal {goal:5.2f} {rows[-1]['reached']}"
                print(
                    f"({out:4}, {inputs:4}) {args.dtype:8} T={tokens:4} {name:13} "
                    f"{rows[-1]['kernel']:8} {found.median * 1e3:9.4f} ms "
                    f"[{found.low * 1e3:.4f} {found.high * 1e3:.4f}] "
                    f"{rows[-1]['gflops']:7} GFLOP/s  {ratio:6.2f} x{mark}",
                    flush=True,
                )
    return rows


def table(rows: list[dict[str, object]], patterns: list[str]) -> str:
    """The goals' table in Markdown: measured / goal, in bold where it is reached."""
    lines = [
        "| weight, tokens | " + " | ".join(patterns) + " |",
        "| --- " * (len(patterns) + 1) + "|",
    ]
    for key in dict.fromkeys((r["out"], r["in"], r["tokens"]) for r in rows):
        cells = []
        for spec in patterns:
            row = next(
                r for r in rows if (r["out"], r["in"], r["tokens"], r["way"]) == (*key, spec)
            )
            text = f"{row['times_best_dense']:.2f}"
            text = f"**{text}**" if row["reached"] == "yes" else text
            cells.append(text + (f" / {row['goal']}" if row["goal"] else ""))
        lines.append(f"| ({key[0]}, {key[1]}), T = {key[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 197, 1024])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=["rotate", "hot"], default="rotate")
    parser.add_argument("--seconds", type=float, default=0.3, help="about this long for each way")
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(args)
    print("\n" + ", ".join(f"{k}: {v}" for k, v in facts().items()) + f", weights: {args.cache}\n")
    print(table(rows, args.patterns))
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
