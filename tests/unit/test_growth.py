"""The work of every call grows as the network does: in Python's own operations, not in seconds.

A mixture whose experts are modules has tens of thousands of weights. A loop over all of them for
each takes minutes there, and nothing at the sizes of other tests.
"""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nmflow

Call = Callable[[], object]


def operations(call: Call) -> int:
    """The instructions of Python that a call runs."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # a collection runs callbacks of what other tests left
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def network(layers: int) -> nn.Module:
    """Its blocks have names of one length, since longer ones cost more."""
    blocks = {str(100 + i): nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for i in range(layers)}
    return nn.Sequential(OrderedDict(blocks))


def pruned(layers: int) -> nn.Module:
    model = network(layers)
    nmflow.prune(model, "1:4", "*")
    return model


def packed(layers: int) -> nn.Module:
    return nmflow.compress(pruned(layers), measure=False)


def running(layers: int) -> tuple[nn.Module, torch.optim.Optimizer, nmflow.Flow]:
    model = network(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    flow = nmflow.attach(model, optimizer, "settling", "1:4", "*", total_steps=9)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer, flow


def loading(layers: int, folder: str) -> Call:
    nmflow.save(packed(layers), folder)
    model = network(layers)
    return lambda: nmflow.load(folder, model)


def shown(flow: nmflow.Flow) -> None:
    with flow.final_masks():
        pass


def finalizing(layers: int) -> Call:
    model, _, flow = running(layers)
    average = copy.deepcopy(model)
    return lambda: flow.finalize_copy(average)


def attaching(layers: int) -> Call:
    model = network(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda: nmflow.attach(model, optimizer, "ste", "1:4", "*", total_steps=9)


def with_(make: Callable[[int], Any], call: Callable[[Any], object]) -> Callable[[int, str], Call]:
    def of(layers: int, folder: str) -> Call:
        made = make(layers)
        return lambda: call(made)

    return of


FROZEN: dict[str, Any] = {"recipe": "one-shot", "sparse_steps": "on"}
CALLS: dict[str, Callable[[int, str], Call]] = {
    "plan": with_(network, lambda m: nmflow.plan(m, "1:4", "*")),
    "attach": lambda layers, folder: attaching(layers),
    "a step": with_(running, lambda run: run[1].step()),
    "state_dict": with_(running, lambda run: run[1].state_dict()),
    "load_state_dict": with_(running, lambda run: run[1].load_state_dict(run[1].state_dict())),
    "final_masks": with_(running, lambda run: shown(run[2])),
    "finalize_copy": lambda layers, folder: finalizing(layers),
    "prune": with_(network, lambda m: nmflow.prune(m, "1:4", "*")),
    "memory": with_(network, lambda m: nmflow.memory(m, "1:4", "*", **FROZEN)),
    "audit, finding": with_(pruned, nmflow.audit),
    "audit, a pattern": with_(pruned, lambda m: nmflow.audit(m, "1:4", "*")),
    "audit, a plan": with_(pruned, lambda m: nmflow.audit(m, nmflow.plan(m, "1:4", "*"))),
    "compress": with_(pruned, lambda m: nmflow.compress(m, measure=False)),
    "decompress": with_(packed, nmflow.decompress),
    "save": lambda layers, folder: partial(nmflow.save, packed(layers), folder),
    "save_state": lambda layers, folder: partial(
        nmflow.save_state, pruned(layers).state_dict(), folder
    ),
    "load": loading,
}


@pytest.mark.parametrize("what", CALLS)
def test_work_grows_as_the_network_does(what: str, tmp_path: Path) -> None:
    """Twice as many layers cost as much more as the first: the second difference is 0."""
    step = 4

    def cost(layers: int) -> int:
        return operations(CALLS[what](layers, tempfile.mkdtemp(dir=tmp_path)))

    cost(step)  # what is cached or imported at first
    one, two, three = (cost(step * n) for n in (1, 2, 3))
    # Of a loop over all layers for each, it is the instructions of its body times step².
    assert abs(three - 2 * two + one) < step**2, (one, two, three)
