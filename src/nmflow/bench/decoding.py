"""Tokens a second of language models: transformers' `generate`, onnxruntime and llama.cpp."""

from __future__ import annotations

import copy
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow.bench import ways
from nmflow.bench.bench import pruned
from nmflow.bench.results import Bench, rows_of
from nmflow.bench.rivals import BF16, INT8
from nmflow.errors import CompressError
from nmflow.packed.compress import compress
from nmflow.packed.decoder import OnnxDecoder, export_decoder
from nmflow.packed.measure import Timing
from nmflow.select.plan import Names, Patterns

RIVALS = ("int8", "bfloat16", "onnxruntime", "llama.cpp")
"""The rivals of a language model that decodes."""
_PROMPT = 16  # tokens before those that are counted
_QUANTIZED = ("Q8_0", "Q4_0")  # that llama.cpp makes of a file, beside the file as it is

_PACKED: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed int8": {"values": "int8", "activations": "int8"},
}

# Continues a text of some tokens by exactly as many as asked for, greedily, from an empty cache.
Decode = Callable[[Sequence[int], int], Any]


def by_generate(model: Any) -> Decode:
    """`model.generate` of transformers, dense or packed."""

    def run(prompt: Sequence[int], new: int) -> Tensor:
        ids = torch.tensor([list(prompt)])
        kept = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **kept)

    return run


def by_onnxruntime(path: str | os.PathLike[str], threads: int) -> Decode:
    """A file of `nmflow.export_decoder`; raises `CompressError` as `OnnxDecoder`."""
    decoder = OnnxDecoder(path, threads=threads)

    def run(prompt: Sequence[int], new: int) -> Tensor:
        return decoder.generate(torch.tensor([list(prompt)]), new)

    return run


def by_llama_cpp(path: str | os.PathLike[str], threads: int) -> Decode:
    """A GGUF file on llama.cpp.

    Raises:
        CompressError: the package is missing (`pip install 'nmflow[llama]'`), or the file is none.
    """
    llama_cpp = _llama()
    try:
        model = llama_cpp.Llama(
            os.fspath(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    except ValueError as error:
        raise CompressError(f"path is '{os.fspath(path)}': {error}") from error

    def run(prompt: Sequence[int], new: int) -> list[int]:
        model.reset()
        tokens = model.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        return [next(tokens) for _ in range(new)]

    return run


def tokens_a_second(
    ways: Mapping[str, Decode], prompt: Sequence[int], *, new: int = 24, rounds: int = 5
) -> dict[str, tuple[float, float, float]]:
    """Tokens a second of every way, turn by turn: median, least and most of some rounds.

    The time of the prompt is not counted: a round is the time of `new + 1` tokens, less the least
    time of one token over the rounds, so that a stall in one makes no token free. Where a whole
    round is no longer than that, the machine is too busy to tell, and the prompt is counted.

    Args:
        ways: names to what decodes.
        prompt: the tokens of a text.
        new: tokens to add.
        rounds: how often each way runs.
    """
    took: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for decode in ways.values():
        decode(prompt, 2)
    for _ in range(rounds):
        for name, decode in ways.items():
            for count, seconds in zip((1, new + 1), took[name], strict=True):
                start = time.perf_counter()
                decode(prompt, count)
                seconds.append(time.perf_counter() - start)
    found = {}
    for name, (one, more) in took.items():
        free = min(one) if min(one) < min(more) else 0.0
        a_second = [new / (seconds - free) for seconds in more]
        found[name] = statistics.median(a_second), min(a_second), max(a_second)
    return found


def bench_decoding(
    model: Any,
    pattern: Patterns | None = "1:16",
    include: Names = "all",
    exclude: Names = (),
    *,
    gguf: str | os.PathLike[str] | None = None,
    rivals: Sequence[str] = RIVALS,
    new: int = 24,
    rounds: int = 5,
    name: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> Bench:
    """Measure how fast a language model decodes, batch 1, packed and in the ways people deploy.

    Every way continues a random text of 16 tokens by `new`, greedily, turn by turn; the time of the
    text is not counted. Packed are all weights of the pattern, without timing layers: with their
    values, and with 8-bit values and inputs. In torch the loop is `generate` of transformers, with
    the head as it is, and with an 8-bit one; in onnxruntime it is `OnnxDecoder`, with an 8-bit one.

    Args:
        model: a causal language model of transformers, float32; a copy is pruned by magnitude.
        pattern: as for `plan`; None takes the patterns that the weights hold.
        include: as for `plan`.
        exclude: as for `plan`.
        gguf: a GGUF file of the same network for llama.cpp, which also makes Q8_0 and Q4_0 of it.
        rivals: of `"int8"` and `"bfloat16"` (torch), `"onnxruntime"` (the extra `onnx`) and
            `"llama.cpp"` (the extra `llama`).
        new: tokens to add.
        rounds: how often each way runs.
        name: what to call the network.
        progress: called with a few words before each part.

    Returns:
        Rows of the level `"decoding"`: microseconds a token, the median of the rounds with the
        fastest and the slowest; `speedup` is over `generate` in float32. `skipped` says of the
        rivals that cannot run here why.

    Raises:
        CompressError: an unknown rival, `new` or `rounds` below 1, or nothing to pack.
        PlanError, PatternError: as for `plan`.
    """
    for rival in rivals:
        if rival not in RIVALS:
            raise CompressError(f"rivals has {rival!r}: choose from {', '.join(RIVALS)}")
    if new < 1 or rounds < 1:
        raise CompressError(f"new is {new} and rounds {rounds}: both must be 1 or more")
    progress("building the ways")
    sparse = pruned(model, pattern, include, exclude)
    threads = torch.get_num_threads()
    runs: dict[str, Decode] = {"dense": by_generate(model)}
    found = Bench()
    if "bfloat16" in rivals:
        runs[BF16] = by_generate(copy.deepcopy(model).bfloat16())
    if "int8" in rivals:
        if (eight := ways.int8_dynamic(model)) is None:
            found.skipped["int8"] = "this torch has no engine for int8 dynamic quantization"
        else:
            runs[INT8] = by_generate(eight)
    with ways.scratch() as folder:
        for way, how in _PACKED.items():
            packed = compress(sparse, tokens=(1,), measure=False, **how)
            runs[way] = by_generate(packed)
            if "int8" in rivals and (both := ways.int8_dynamic(packed)) is not None:
                runs[f"{way}, int8 head"] = by_generate(both)  # what is still dense
            if "onnxruntime" in rivals and "onnxruntime" not in found.skipped:
                progress(f"writing a decoding step: {way}")
                try:
                    file = Path(folder, f"{way.replace(' ', '-')}.onnx")
                    step = export_decoder(packed, file, head="int8")
                    runs[f"onnxruntime {way}, int8 head"] = by_onnxruntime(step, threads)
                except CompressError as error:
                    found.skipped["onnxruntime"] = str(error)
        if "llama.cpp" in rivals:
            progress("llama.cpp")
            try:
                runs |= _llama_cpp(gguf, Path(folder), threads)
            except CompressError as error:
                found.skipped["llama.cpp"] = str(error)
        progress(f"{len(runs)} ways")
        draw = torch.Generator().manual_seed(0)
        text = torch.randint(model.config.vocab_size, (_PROMPT,), generator=draw).tolist()
        took = tokens_a_second(runs, text, new=new, rounds=rounds)
    times = {
        way: Timing(1e6 / median, 1e6 / most, 1e6 / least, rounds)
        for way, (median, least, most) in took.items()
    }
    label = name or type(model).__name__
    said = str(pattern) if pattern is not None else "held"
    found.rows = rows_of(times, "decoding", label, "", said, "float32", 1, {})
    return found


def _llama_cpp(
    gguf: str | os.PathLike[str] | None, folder: Path, threads: int
) -> dict[str, Decode]:
    """llama.cpp on a file, and on what it quantizes of it."""
    llama_cpp = _llama()
    if gguf is None:
        raise CompressError("llama.cpp runs only GGUF files: give one as the model")
    file = Path(gguf)
    runs = {f"llama.cpp {file.stem.rpartition('.')[2]}": by_llama_cpp(file, threads)}
    for kind in _QUANTIZED:
        if f"llama.cpp {kind}" in runs:
            continue
        made = folder / f"{kind}.gguf"
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.allow_requantize, wanted.nthread = True, threads
        wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        paths = os.fsencode(file), os.fsencode(made)
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(wanted)):
            raise CompressError(f"llama.cpp cannot make {kind} of '{file}'")
        runs[f"llama.cpp {kind}"] = by_llama_cpp(made, threads)
    return runs


def _llama() -> Any:
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise CompressError(
            "llama.cpp's figures need the package 'llama-cpp-python': pip install 'nmflow[llama]'"
        ) from error
    return llama_cpp
