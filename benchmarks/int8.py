"""Packed products with rounded values against the deployed: onnxruntime, torch's int8, bfloat16.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/int8.py --csv int8.csv

The dense ways are `F.linear` and packed oneDNN in float32, packed oneDNN in bfloat16 (x and y are
converted in the call), torch's dynamic int8 and, where it is installed, onnxruntime's dynamic int8
of one `MatMul` (its session's call is timed, with x and y in numpy arrays). Packed ways go through
nmflow's op. See `_timing.py` for what is a sample and where weights lie; onnxruntime's sessions are
rotated too, `--sessions` of them, so that its weights come from memory as well.
"""

from __future__ import annotations

import argparse

import torch

from _timing import copies_of, facts, interleaved, rotate, write_csv
from kernels import dense_calls, sparse
from nmflow.kernels import int8, matmul, matmul_int8
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.packed.bfloat16 import product
from nmflow.packed.measure import rounded_ways
from nmflow.pattern import Pattern

SHAPES = ((3072, 768), (768, 3072))
PATTERNS = ("2:4", "1:4", "1:8", "1:16")
INT8 = ("int8 dynamic", "onnxruntime int8")
ROUNDED = (*INT8, "oneDNN bfloat16")


def onnx_calls(x: torch.Tensor, w: torch.Tensor, sessions: int) -> dict:
    """onnxruntime's dynamic int8 of `x @ W.T`, rotating through sessions of their own weights."""
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return {}
    import tempfile
    from pathlib import Path

    onnxruntime.set_default_logger_severity(3)
    made = []
    with tempfile.TemporaryDirectory() as folder:
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "product",
            [onnx.helper.make_tensor_value_info("x", 1, ["t", w.shape[1]])],
            [onnx.helper.make_tensor_value_info("y", 1, ["t", w.shape[0]])],
            [onnx.numpy_helper.from_array(w.T.contiguous().numpy(), "w")],
        )
        opset = [onnx.helper.make_opsetid("", 17)]
        model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
        plain, rounded = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, plain)
        quantize_dynamic(plain, rounded, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        feed = {"x": x.numpy()}
        for _ in range(sessions):
            session = onnxruntime.InferenceSession(
                rounded, options, providers=["CPUExecutionProvider"]
            )
            made.append(lambda session=session: session.run(None, feed))
    return {"onnxruntime int8": rotate(made)}


def packed_calls(x: torch.Tensor, out: int, pattern: Pattern, cache: str) -> tuple[dict, dict]:
    """The packed ways of one pattern: float32, bfloat16, 8-bit values, and activations too."""
    inputs, tokens = x.shape[1], x.shape[0]
    shape = Shape.of(out, inputs, pattern)
    values, index = canonical_from_dense(sparse(out, inputs, pattern, torch.float32), shape)
    a, b = tiled_from_canonical(values, index, shape)
    half = values.bfloat16()
    c, d = tiled_from_canonical(half, index, shape)
    halves = [(c.clone(), d.clone()) for _ in range(copies_of(c.nbytes + d.nbytes, cache, tokens))]
    stream = int8.stream_from_canonical(*int8.round_values(values), index, shape)
    dims = (out, inputs, pattern.n, pattern.m, pattern.panel)
    floats = [(a.clone(), b.clone()) for _ in range(copies_of(a.nbytes + b.nbytes, cache, tokens))]
    streams = [stream.clone() for _ in range(copies_of(stream.nbytes, cache, tokens))]
    name = str(pattern)
    calls = {
        f"{name} float32": rotate(
            [lambda a=a, b=b: matmul(x, a, b, None, dims) for a, b in floats]
        ),
        f"{name} bfloat16": rotate(
            [lambda c=c, d=d: product(x, c, d, None, dims, 0, torch.float32) for c, d in halves]
        ),
    }
    for rounds, way in enumerate(("int8 values", "int8")):
        calls[f"{name} {way}"] = rotate(
            [lambda s=s, r=rounds: matmul_int8(x, s, None, dims, r) for s in streams]
        )
    sizes = dict.fromkeys(calls, stream.nbytes)
    sizes[f"{name} float32"] = a.nbytes + b.nbytes
    sizes[f"{name} bfloat16"] = c.nbytes + d.nbytes
    return calls, sizes


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """All rows, printed as they come."""
    rows: list[dict[str, object]] = []
    where = facts()
    for out, inputs in args.shapes:
        for tokens in args.tokens:
            x, w = torch.randn(tokens, inputs), torch.randn(out, inputs)
            calls = dense_calls(x, w, args.cache)
            del calls["oneDNN"]
            count = copies_of(w.nbytes // 4, args.cache, tokens) // 4 + 1
            rounded = [rounded_ways(w.clone(), None, x) for _ in range(count)]
            calls |= {way: rotate([one[way] for one in rounded]) for way in rounded[0]}
            calls |= onnx_calls(x, w, args.sessions)
            sizes: dict[str, int] = {}
            for spec in args.patterns:
                made, held = packed_calls(x, out, Pattern(spec), args.cache)
                calls |= made
                sizes |= held
            times = interleaved(calls, args.seconds)
            dense = {name: found.median for name, found in times.items() if name not in sizes}
            best = min(dense, key=lambda name: dense[name])
            best_int8 = min((n for n in INT8 if n in dense), key=lambda n: dense[n], default="")
            best_rounded = min(
                (n for n in ROUNDED if n in dense), key=lambda n: dense[n], default=""
            )
            for name, found in times.items():
                row: dict[str, object] = {
                    **{"out": out, "in": inputs, "tokens": tokens, "way": name},
                    "median_us": round(found.median * 1e6, 2),
                    **{"q10_us": round(found.low * 1e6, 2), "q90_us": round(found.high * 1e6, 2)},
                    **{"samples": found.samples, "bytes": sizes.get(name, "")},
                    "times_best_int8": round(dense[best_int8] / found.median, 2)
                    if best_int8
                    else "",
                    "times_best_rounded": round(dense[best_rounded] / found.median, 2)
                    if best_rounded
                    else "",
                    "times_bfloat16": round(dense["oneDNN bfloat16"] / found.median, 2)
                    if "oneDNN bfloat16" in dense
                    else "",
                    "times_best_dense": round(dense[best] / found.median, 2),
                    **{"best_int8": best_int8, "best_dense": best, "cache": args.cache, **where},
                }
                rows.append(row)
                print(
                    f"({out:5}, {inputs:4}) T={tokens:4} {name:18} {row['median_us']:9} us"
                    f" [{row['q10_us']} {row['q90_us']}]  x int8 {row['times_best_int8']}"
                    f"  x rounded {row['times_best_rounded']}  x dense {row['times_best_dense']}",
                    flush=True,
                )
    return rows


def table(rows: list[dict[str, object]], key: str, way: str, patterns: list[str]) -> str:
    """Ratios of one packed way in Markdown, a column for each pattern."""
    lines = [
        "| weight, tokens | " + " | ".join(patterns) + " |",
        "| --- " * (len(patterns) + 1) + "|",
    ]
    for place in dict.fromkeys((r["out"], r["in"], r["tokens"]) for r in rows):
        found = {r["way"]: r[key] for r in rows if (r["out"], r["in"], r["tokens"]) == place}
        cells = [f"{found[f'{spec} {way}']}" for spec in patterns]
        lines.append(f"| ({place[0]}, {place[1]}), T = {place[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 197, 1024])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--shapes", nargs="+", default=[f"{o}x{i}" for o, i in SHAPES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=["rotate", "hot"], default="rotate")
    parser.add_argument("--sessions", type=int, default=16, help="of onnxruntime")
    parser.add_argument("--seconds", type=float, default=0.2, help="about this long for each way")
    parser.add_argument("--csv")
    args = parser.parse_args()
    args.shapes = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(args)
    print("\n" + ", ".join(f"{k}: {v}" for k, v in facts().items()) + f", weights: {args.cache}")
    for way, key in (
        *(("int8", "times_best_int8"), ("int8", "times_best_rounded")),
        *(("int8 values", "times_best_int8"), ("float32", "times_best_dense")),
        *(("bfloat16", "times_best_rounded"), ("bfloat16", "times_bfloat16")),
    ):
        print(f"\n{way}, {key}\n\n" + table(rows, key, way, args.patterns))
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
