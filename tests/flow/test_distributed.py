"""Two processes on gloo: DDP and FSDP2 train to the masks and weights of one process.

One launch of the two processes runs many checks, since a launch takes longer than all of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import nmflow
import processes
import reference
from harness import ADAMW, Run, assert_same, attach, parameters_of, through_file
from models import BY_ID as FAMILY
from models import Experts, Family, HFConv1D, Spec, loss_of
from nmflow.errors import NMFlowError, StateError
from nmflow.flow.sharding import local
from settings import BY_ID, OPTIMIZERS, TOTAL, Case

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)

CASES = ["sr-ste", "mdgf-linear-masked", "hybrid", "one-shot", "mdgf-frozen", "gradual", "settling"]


def _process(rank: int, check: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    check(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def launch(check: Callable[[int, Path], None], folder: Path) -> None:
    processes.launch(_process, check, folder)


def alone(family: Family, case: str, optimizer: str = "adamw-foreach") -> list[dict[str, Any]]:
    """The weights of one process before each step and at the end."""
    run, seen = Run(family, BY_ID[case], OPTIMIZERS[optimizer]), []
    for x in family.batches(TOTAL):
        seen.append(parameters_of(run.model))
        run.step(x)
    return [*seen, parameters_of(run.model)]


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter unsharded, under its plain name."""
    found = {}
    for name, p in model.named_parameters():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        found[name.removeprefix("module.")] = full.detach().clone()
    return found


def agree(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
    for name, weight in got.items():
        assert torch.equal(weight != 0, want[name] != 0), f"{what}: the mask of {name} differs"
        torch.testing.assert_close(
            weight,
            want[name],
            rtol=1e-9,
            atol=1e-9,
            msg=lambda text, name=name: f"{what} {name}: {text}",
        )


# --- DDP --------------------------------------------------------------------------------------


def _ddp(rank: int, folder: Path) -> None:
    for name, cases in (("encoder-layer", CASES[:3]), ("conv2d-grouped", CASES[3:])):
        family = FAMILY[name]
        for i, case in enumerate(cases):
            want, what = alone(family, case), f"{family.id} {case}"
            model = family.build()
            wrapped: nn.Module
            if i % 2:  # attached to the wrapper, or to the model before it is wrapped
                optimizer = ADAMW(model.parameters())
                attach(model, optimizer, BY_ID[case], family)
                wrapped = DistributedDataParallel(model)
            else:
                wrapped = DistributedDataParallel(model)
                optimizer = ADAMW(wrapped.parameters())
                attach(wrapped, optimizer, BY_ID[case], family)
            for k, x in enumerate(family.batches(TOTAL)):
                agree(whole(wrapped), want[k], f"{what} step {k}")
                optimizer.zero_grad()
                half = x.chunk(2)[rank]
                if k % 3:  # two micro-batches, the first without communication
                    parts = half.chunk(2)
                    assert isinstance(wrapped, DistributedDataParallel)
                    with wrapped.no_sync():
                        (loss_of(wrapped(parts[0])) / 2).backward()
                    (loss_of(wrapped(parts[1])) / 2).backward()
                else:
                    loss_of(wrapped(half)).backward()
                optimizer.step()
            agree(whole(wrapped), want[TOTAL], f"{what} at the end")


def test_ddp(tmp_path: Path) -> None:
    launch(_ddp, tmp_path)


# --- FSDP2 ------------------------------------------------------------------------------------


def _odd() -> nn.Module:
    """Seven rows are sharded 4 and 3; one row leaves the second process an empty shard."""
    return nn.Sequential(nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 16), nn.Linear(16, 1))


ODD = Family("odd", _odd, (16,), {"0.weight": Spec(), "3.weight": Spec()}, include=["0.*", "3.*"])
EVEN_PANELS = Family(
    "panels of 4",
    FAMILY["linear"].make,
    (16,),
    {"0.weight": Spec()},
    include=["0.*"],
    pattern="1:4@4",
)
# Two processes share three experts; of one expert the second holds nothing.
ONE_EXPERT = replace(FAMILY["experts"], id="one expert", make=lambda: Experts(1))
SHARDED = [ODD, EVEN_PANELS]
SHARDED += [FAMILY[name] for name in ("fused-qkv", "hf-conv1d", "encoder-layer", "linear")]
PAIRS = [(ODD, "one-shot"), (EVEN_PANELS, "hybrid"), (FAMILY["fused-qkv"], "mdgf-linear-masked")]
PAIRS += [(FAMILY["hf-conv1d"], "sr-ste"), (FAMILY["encoder-layer"], "mdgf-frozen")]
PAIRS += [(FAMILY["linear"], "gradual"), (FAMILY["experts"], "settling"), (ONE_EXPERT, "hybrid")]


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for child in model.children():
        if type(child) is not nn.Module and list(child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class ShardedRun:
    def __init__(self, family: Family, case: str, optimizer: str, seed: int = 0) -> None:
        self.model = shard(family.build(seed=seed))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.flow: Any = attach(self.model, self.optimizer, BY_ID[case], family)

    def step(self, rank: int, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model(x.chunk(2)[rank])).backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        model, optimizer = dsd.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def _trains(rank: int, folder: Path, family: Family, case: str) -> None:
    """Train, checkpoint, look through final_masks(), finalize, resume: as one process does."""
    i = CASES.index(case)
    optimizer = ["adamw-foreach", "sgd", "adamw-fused"][i % 3]
    want = alone(family, case, optimizer)
    batches, what = family.batches(TOTAL), f"{family.id} {case} {optimizer}"
    run = ShardedRun(family, case, optimizer)
    stop = 2 + (3 * i) % 10
    checkpoint = str(folder / f"{family.id}-{case}".replace(" ", "-"))
    for k, x in enumerate(batches):
        agree(whole(run.model), want[k], f"{what} step {k}")
        if k == stop:
            dcp_save(run.state(), checkpoint_id=checkpoint)
        if k == 8:
            before = whole(run.model)
            with run.flow.final_masks():
                hold(whole(run.model), family)
            with run.flow.dense(), torch.no_grad():
                for p in run.model.parameters():
                    p.mul_(2.0).div_(2.0)
            run.model.load_state_dict(run.model.state_dict())
            run.flow.sync()
            assert_same(whole(run.model), before, f"{what} final_masks, dense, sync")
            written = next(run.model.get_parameter(name) for name in family.targets)
            kept = written.detach().clone()
            with torch.no_grad():
                written.add_(1.0)
            if local(written).numel():  # a process sees its own part
                with pytest.raises(StateError, match="sync"), run.flow.final_masks():
                    pass
            load = dict(run.model.state_dict())
            load[next(iter(family.targets))] = kept
            run.model.load_state_dict(load)
        run.step(rank, x)
    last = whole(run.model)
    agree(last, want[TOTAL], f"{what} at the end")
    run.flow.finalize()
    assert_same(whole(run.model), last, f"{what} finalized")
    hold(whole(run.model), family)

    again = ShardedRun(family, case, optimizer, seed=99)
    state = again.state()
    dcp_load(state, checkpoint_id=checkpoint)
    dsd.set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert again.flow.steps_done == stop, what
    for x in batches[stop:]:
        again.step(rank, x)
    assert_same(whole(again.model), last, f"{what} resumed at {stop}")


def hold(weights: dict[str, torch.Tensor], family: Family) -> None:
    n, m, panel = reference.parse(family.pattern)
    for name, spec in family.targets.items():
        rows = reference.rows_of(weights[name], spec)
        assert reference.holds(rows, n, m, spec.dim, panel, spec.stacked), name


REFUSED: list[tuple[str, Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = [
    (  # 12 rows are sharded 6 and 6, and a panel of 4 would be cut
        "panel",
        lambda: nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)),
        {"pattern": "1:4@4", "include": ["0.*"]},
        ("0.weight", "1:4@4"),
    ),
    (  # GPT-2's projection is stored (in, out): 8 inputs are sharded 4 and 4
        "group on the sharded axis",
        HFConv1D,
        {"pattern": "1:8", "include": ["up.*"]},
        ("up.weight", "8"),
    ),
    (  # 1:4 itself would fit the shards of 8, but its first frames do not
        "geometric frame on the sharded axis",
        HFConv1D,
        {
            "pattern": "1:4",
            "include": ["down.*"],
            "recipe": nmflow.SDGF(structure="geometric"),
        },
        ("down.weight",),
    ),
]


def _refusals(rank: int, folder: Path) -> None:
    """A shard that would cut a panel or a group is refused by name, on every process."""
    for what, make, options, words in REFUSED:
        torch.manual_seed(0)
        model = shard(make().double())
        optimizer = ADAMW(model.parameters())
        before = copy.deepcopy(whole(model))
        with pytest.raises(NMFlowError) as caught:
            nmflow.attach(model, optimizer, **{"recipe": "ste", "total_steps": 10, **options})
        assert all(word in str(caught.value) for word in words), (what, str(caught.value))
        assert_same(whole(model), before, what)
        assert not optimizer.state
        assert not optimizer._optimizer_step_pre_hooks


def _first_save(rank: int, folder: Path) -> None:
    """A checkpoint before any step, whose phantom step must not count on any process."""
    family, case = FAMILY["linear"], "sr-ste"
    run = ShardedRun(family, case, "adamw-foreach")
    dcp_save(run.state(), checkpoint_id=str(folder / "first"))
    assert run.flow.steps_done == 0
    agree(whole(run.model), alone(family, case)[0], "after the first save")
    other = ShardedRun(family, case, "adamw-foreach", seed=99)
    state = other.state()
    dcp_load(state, checkpoint_id=str(folder / "first"))
    dsd.set_state_dict(
        other.model,
        other.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert other.flow.steps_done == 0
    for x in family.batches(TOTAL):
        run.step(rank, x)
        other.step(rank, x)
    assert_same(whole(run.model), whole(other.model), "resumed at 0")
    hold(whole(run.model), family)


def _full_state(rank: int, folder: Path) -> None:
    """A full state dict, gathered on every process, resumes in a single process as well."""
    family, case, stop = FAMILY["fused-qkv"], "mdgf-linear-masked", 6
    run = ShardedRun(family, case, "adamw-foreach")
    batches = family.batches(TOTAL)
    for x in batches[:stop]:
        run.step(rank, x)
    options = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = through_file(dsd.get_state_dict(run.model, run.optimizer, options=options))
    for x in batches[stop:]:
        run.step(rank, x)
    if rank == 0:
        single = Run(family, Case("", "MDGF", BY_ID[case].kwargs), seed=99)
        dsd.set_state_dict(
            single.model,
            single.optimizer,
            model_state_dict=saved[0],
            optim_state_dict=saved[1],
        )
        assert single.flow.steps_done == stop
        single.train(batches[stop:])
        torch.save(parameters_of(single.model), folder / "single.pt")
    dist.barrier()
    agree(whole(run.model), torch.load(folder / "single.pt"), "resumed in one process")


def _prunes(rank: int, folder: Path) -> None:
    """`prune` of shards is that of the whole, and says the same; what cuts a group is refused."""
    for family in (FAMILY["linear"], FAMILY["fused-qkv"]):
        whole_one, model = family.build(), shard(family.build())
        want = nmflow.prune(whole_one, family.pattern, family.include)
        with pytest.raises(NMFlowError, match="is sharded"):
            nmflow.prune(
                model, family.pattern, family.include, method="wanda",
                calibration=list(family.batches(1)),
            )  # fmt: skip
        found = nmflow.prune(model, family.pattern, family.include)
        assert_same(whole(model), parameters_of(whole_one), family.id)
        assert [one.label for one in found] == [one.label for one in want]
        for one, other in zip(found, want, strict=True):
            assert one.kept == pytest.approx(other.kept, rel=1e-12), one.label
    for what, make, options, words in REFUSED[:2]:
        model = shard(make().double())
        before = copy.deepcopy(whole(model))
        with pytest.raises(NMFlowError) as caught:
            nmflow.prune(model, **options)
        assert all(word in str(caught.value) for word in words), (what, str(caught.value))
        assert_same(whole(model), before, what)


def _fsdp(rank: int, folder: Path) -> None:
    _refusals(rank, folder)
    _prunes(rank, folder)
    _first_save(rank, folder)
    _full_state(rank, folder)
    for family, case in PAIRS:
        _trains(rank, folder, family, case)


def _everything(rank: int, folder: Path) -> None:
    for family in SHARDED:
        for case in CASES:
            _trains(rank, folder, family, case)


def test_fsdp2(tmp_path: Path) -> None:
    launch(_fsdp, tmp_path)


@pytest.mark.slow
def test_fsdp2_everything(tmp_path: Path) -> None:
    launch(_everything, tmp_path)
