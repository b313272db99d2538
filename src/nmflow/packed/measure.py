"""Timing: several ways of one computation, interleaved, as medians and quantiles."""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmflow.masks import holds
from nmflow.packed.onednn import onednn_takes

Way = Callable[[], object]
_LARGEST_CACHE = 64 << 20  # bytes of a third-level cache, where one core may fill it


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, first and ninth decile, and how many runs they are of."""

    median: float
    q10: float
    q90: float
    runs: int


def time_ways(
    ways: Mapping[str, Way],
    budget: float = 0.05,
    least: int = 5,
    most: int = 2000,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each way in turn, so that a slow second of the machine affects them all.

    Args:
        ways: name to a function without arguments.
        budget: seconds to spend on each way, about.
        least: runs of each way at least.
        most: runs of each way at most.
        clock: seconds; `time.thread_time` counts the calling thread's work only, which is right
            for one thread on a machine that others use too.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    spent = 0.0
    for way in ways.values():
        way()
        way()
    while True:
        runs = min(map(len, took.values()))
        if runs >= most or (runs >= least and spent >= budget * len(ways)):
            break
        for name, way in ways.items():
            start = clock()
            way()
            seconds = clock() - start
            took[name].append(seconds * 1e6)
            spent += seconds
    return {name: _timing(times) for name, times in took.items()}


def _timing(times: list[float]) -> Timing:
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return Timing(statistics.median(times), cuts[0], cuts[-1], len(times))


def rotated(ways: Sequence[Mapping[str, Way]]) -> dict[str, Way]:
    """The same ways on several copies of a weight: each call uses the next copy.

    A network's layers push each other out of the caches; one copy, called again and again, would
    not. Every copy is called once, so that no first call is timed.
    """

    def way(name: str) -> Way:
        calls = itertools.cycle([one[name] for one in ways])
        for _ in ways:
            next(calls)()
        return lambda: next(calls)()

    return {name: way(name) for name in ways[0]}


def copies_in_network(nbytes: int, layers: int) -> int:
    """How many copies of a dense weight stand for that many layers of a network on a CPU.

    One for each layer, until they fill the largest caches: more would take memory for nothing.
    """
    return max(1, min(layers, -(-_LARGEST_CACHE // max(nbytes, 1))))


def time_on_gpu(ways: Mapping[str, Sequence[Way]], rounds: int = 20) -> dict[str, Timing]:
    """Time ways on the current GPU: each a CUDA graph of its calls, replayed turn by turn.

    Args:
        ways: name to calls that do the same on copies of a weight, so that the copies do not stay
            in the L2 between two replays, as a network's own weights do not.
        rounds: replays of each graph.

    Returns:
        Microseconds of one call.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in ways.items():
        # A first run compiles kernels, which a capture must not.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        # torch's own stream for captures is of the GPU that had the first one.
        with torch.cuda.graph(graphs[name], stream=side):
            for call in calls:
                call()
        graphs[name].replay()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            took[name].append(start.elapsed_time(end) * 1e3 / len(ways[name]))
    return {name: _timing(times) for name, times in took.items()}


def copies_past_cache(nbytes: int, device: torch.device, most: int = 64) -> int:
    """How many copies of a weight are twice the L2 of a GPU, at most `most`."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(2, min(most, -(-2 * cache // max(nbytes, 1))))


def gpu_ways(weight: Tensor, bias: Tensor | None, x: Tensor) -> dict[str, list[Way]]:
    """The dense ways on a GPU: cuBLAS, and cuSPARSELt where it takes a weight of 2:4."""
    count = copies_past_cache(weight.nbytes, weight.device)

    def way(w: Tensor) -> Way:
        return lambda: F.linear(x, w, bias)

    ways: dict[str, list[Way]] = {"cuBLAS": [way(weight.clone()) for _ in range(count)]}
    if holds(weight, "2:4"):
        try:
            ways["cuSPARSELt"] = [
                way(torch.sparse.to_sparse_semi_structured(weight)) for _ in range(count)
            ]
            ways["cuSPARSELt"][0]()
        except torch.OutOfMemoryError:  # a way that is left out would have lost
            raise
        except (RuntimeError, ValueError, NotImplementedError):  # its sizes, its cards
            ways.pop("cuSPARSELt", None)
    return ways


def dense_ways(weight: Tensor, bias: Tensor | None, x: Tensor) -> dict[str, Way]:
    """The dense ways to multiply `x (T, in)` by `weight (out, in)`: F.linear and oneDNN's two."""
    ways: dict[str, Way] = {"F.linear": lambda: F.linear(x, weight, bias)}
    if x.device.type == "cpu" and onednn_takes(x.dtype):
        multiply = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        ways["oneDNN"] = lambda: multiply(x, weight, bias, "none", [], "")
        ways["oneDNN packed"] = lambda: multiply(x, packed, bias, "none", [], "")
    return ways


def rounded_ways(weight: Tensor, bias: Tensor | None, x: Tensor) -> dict[str, Way]:
    """The dense ways of a float32 layer that round: bfloat16 by oneDNN, and torch's int8."""
    ways: dict[str, Way] = {}
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return ways
    if onednn_takes(torch.bfloat16):
        half, half_bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(half, x.shape[0])
        multiply = torch.ops.mkldnn._linear_pointwise
        ways["oneDNN bfloat16"] = lambda: multiply(
            x.bfloat16(), packed, half_bias, "none", [], ""
        ).float()
    if "x86" in torch.backends.quantized.supported_engines:
        step = (weight.abs().amax(1).double() / 127).clamp_min(1e-12)
        zeros = torch.zeros(len(step), dtype=torch.int64)
        with warnings.catch_warnings():  # torch will remove it, and has nothing as fast yet
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, step, zeros, 0, torch.qint8)
        ready = torch.ops.quantized.linear_prepack(rounded, bias)
        ways["int8 dynamic"] = lambda: torch.ops.quantized.linear_dynamic(x, ready, True)
    return ways


def conv_ways(conv: nn.Module, x: Tensor) -> dict[str, Way]:
    """The dense ways to run a convolution: as it is, channels last, and oneDNN packed."""
    wide = {3: None, 4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
    ways: dict[str, Way] = {"conv": lambda: conv(x)}
    if wide is not None:
        last = x.to(memory_format=wide)
        ways["conv, channels last"] = lambda: conv(last)
    c = conv
    if (
        x.device.type == "cpu"
        and onednn_takes(x.dtype)
        and x.dim() == 4
        and type(c.padding) is tuple
    ):
        sizes = (c.padding, c.stride, c.dilation, c.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(c.weight, *sizes, list(x.shape))
        run = torch.ops.mkldnn._convolution_pointwise
        if c.padding_mode == "zeros":  # pyright: ignore
            ways["oneDNN packed"] = lambda: run(x, packed, c.bias, *sizes, "none", [], "")
    return ways
