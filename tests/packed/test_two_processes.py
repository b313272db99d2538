"""Several processes and one folder: a reader never meets half a network, a kill leaves a whole one.

Every network here is told by one number, which all of its tensors hold.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmflow import disk
from nmflow.errors import CompressError
from nmflow.packed import load, load_state, save, save_state

SPAWN = multiprocessing.get_context("fork")
WRITERS, LOADS = 3, 60


def state(number: int) -> dict[str, Tensor]:
    w = torch.zeros(32, 64)
    w[:, ::16] = number
    return {"0.weight": w, "0.bias": torch.full((32,), float(number))}


def model(number: int) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 32))
    made.load_state_dict(state(number))
    return made


def number_of(found: dict[str, Tensor]) -> int:
    number = int(found["0.bias"][0])
    assert torch.equal(found["0.bias"], torch.full((32,), float(number)))
    assert torch.equal(found["0.weight"], state(number)["0.weight"])
    return number


def keep_saving(folder: Path, number: int, done: Any) -> None:
    torch.set_num_threads(1)
    i = 0
    # The same contents again and again, too: their files have the same names.
    while not done.is_set():
        i += 1
        if i % 2:
            save(model(number), folder)
        else:
            save_state(state(number * 10 + i % 3), folder)


def keep_loading(folder: Path) -> None:
    """Load so often, and until another network has come."""
    torch.set_num_threads(1)
    seen: set[int] = set()
    times = 0
    while times < LOADS or len(seen) < 2:
        if times % 2:
            found = load_state(folder)
        else:
            found = {
                name: t.detach()
                for name, t in load(folder, model(0))[0].named_parameters()
                if name == "bias"
            }
            found = {"0.bias": found["bias"], "0.weight": state(int(found["bias"][0]))["0.weight"]}
        seen.add(number_of(found))
        times += 1


def test_readers_meet_whole_networks_while_others_save(tmp_path: Path) -> None:
    save(model(1), tmp_path)
    done = SPAWN.Event()
    writers = [
        SPAWN.Process(target=keep_saving, args=(tmp_path, i + 1, done)) for i in range(WRITERS)
    ]
    readers = [SPAWN.Process(target=keep_loading, args=(tmp_path,)) for _ in range(2)]
    for process in (*writers, *readers):
        process.start()
    for process in readers:
        process.join(600)
    done.set()
    for process in writers:
        process.join(600)
    assert [p.exitcode for p in (*writers, *readers)] == [0] * (WRITERS + 2)
    assert number_of(load_state(tmp_path)) > 0
    header = json.loads((tmp_path / "nmflow.json").read_text())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["nmflow.json", header["file"]]


def killed_at(folder: Path, event: str) -> None:
    """Die where the file system is touched for the given purpose, as by a power cut."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if event == "before tensors" and str(target).endswith(".safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "before header" and str(target).endswith("nmflow.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if event == "after header" and str(target).endswith("nmflow.json"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    save(model(2), folder)


@pytest.mark.parametrize("event", ["before tensors", "before header", "after header"])
def test_a_killed_save_leaves_a_whole_network_and_the_next_one_cleans_up(
    tmp_path: Path, event: str
) -> None:
    save(model(1), tmp_path)
    process = SPAWN.Process(target=killed_at, args=(tmp_path, event))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 2  # its leftovers
    assert number_of(load_state(tmp_path)) == (2 if event == "after header" else 1)
    save(model(3), tmp_path)
    assert number_of(load_state(tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_threads_exclude_each_other_and_one_may_hold_a_folder_twice(tmp_path: Path) -> None:
    inside, most = 0, 0

    def hold() -> None:
        nonlocal inside, most
        for _ in range(20):
            with disk.locked(tmp_path), disk.locked(tmp_path / "."):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_header_of_another_tool_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "nmflow.json").write_text('{"step": 3}')
    with pytest.raises(CompressError, match=r"holds a nmflow\.json that is not the header"):
        save(model(1), tmp_path)
    assert (tmp_path / "nmflow.json").read_text() == '{"step": 3}'
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "nmflow.json").write_text('{"format": "nmf')  # a damaged one of ours
    save(model(1), tmp_path)
    assert number_of(load_state(tmp_path)) == 1
