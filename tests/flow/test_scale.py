"""Meshes on gloo: tensor and expert parallel, FSDP2's options, other numbers of processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import agree, alone, hold, whole
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import nmflow
import processes
import reference
from harness import ADAMW, Run, assert_same, attach, parameters_of
from models import BY_ID as FAMILY
from models import Experts, Family, Spec, loss_of
from nmflow.errors import FlowError
from nmflow.flow.sharding import local
from settings import BY_ID, TOTAL

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)

Check = Callable[[int, Path], None]


def _process(rank: int, world: int, check: Check, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store-{check.__name__}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    check(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def launch(check: Check, folder: Path, world: int) -> None:
    processes.launch(_process, world, check, folder, world=world)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for child in model.children():
        if type(child) is not nn.Module and list(child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, flow: nmflow.Flow, optimizer: Any, parts: list[torch.Tensor]) -> None:
    for x in parts:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


MLP = Family("mlp", _mlp, (16,), {"0.weight": Spec(), "2.weight": Spec()}, include="*")
CASES = ["sr-ste", "mdgf-linear-masked", "hybrid", "one-shot", "mdgf-frozen", "settling"]


# -- tensor parallel ---------------------------------------------------------------------------


def parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The first layer by its outputs, the second by its inputs, as in a feed-forward block."""
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _trains_as_alone(
    family: Family, case: str, model: nn.Module, parts: list[torch.Tensor], what: str
) -> None:
    want = alone(family, case)
    optimizer = ADAMW(model.parameters())
    flow = attach(model, optimizer, BY_ID[case], family)
    for k, x in enumerate(parts):
        agree(whole(model), want[k], f"{what} step {k}")
        if k == 8:
            with flow.final_masks():
                hold(whole(model), family)
        train(model, flow, optimizer, [x])
    agree(whole(model), want[TOTAL], f"{what} at the end")
    flow.finalize()
    hold(whole(model), family)


PANELS = Family(
    "mlp by panels", _mlp, (16,), {"0.weight": Spec(), "2.weight": Spec()}, "*", "1:4@4"
)


def _tensor_parallel(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for family, cases in ((MLP, CASES), (PANELS, CASES[:2])):
        for case in cases:
            model = parallel(family.build(), mesh)
            what = f"tensor parallel, {family.id}, {case}"
            _trains_as_alone(family, case, model, family.batches(TOTAL), what)
    cut = parallelize_module(
        nn.Sequential(nn.Linear(24, 8)).double(), mesh, {"0": RowwiseParallel()}
    )
    before = whole(cut)
    optimizer = ADAMW(cut.parameters())
    with pytest.raises(FlowError, match=r"'0\.weight'.*part of 12.*cuts groups of 8: shard"):
        nmflow.attach(cut, optimizer, "ste", "1:8", include="*", total_steps=9)
    assert_same(whole(cut), before)
    assert not optimizer.state


def _sums(experts: int) -> Family:
    stacked = {"up_experts.proj": Spec(2, None, True), "down_experts.proj": Spec(1, None, True)}
    return Family("experts", lambda: Experts(experts), (8,), stacked, include="*")


def _expert_parallel(rank: int, folder: Path) -> None:
    """Each process holds some experts; gradients are those of all of them."""
    mesh = init_device_mesh("cpu", (2,))
    for experts, case in ((4, "settling"), (3, "hybrid"), (1, "sr-ste"), (4, "one-shot")):
        family = _sums(experts)
        plain = Run(family, BY_ID[case])
        model = family.build()
        stack: Any
        for stack in model.children():
            split = distribute_tensor(stack.proj.detach(), mesh, [Shard(0)])
            stack.proj = nn.Parameter(split)
        optimizer = ADAMW(model.parameters())
        attach(model, optimizer, BY_ID[case], family)
        for x in family.batches(TOTAL):
            agree(whole(model), parameters_of(plain.model), f"{experts} experts, {case}")
            plain.optimizer.zero_grad()
            loss_of(plain.model(x)).backward()
            for name, p in model.named_parameters():
                grad = plain.model.get_parameter(name).grad
                assert grad is not None
                p.grad = distribute_tensor(grad, mesh, [Shard(0)])
            plain.optimizer.step()
            optimizer.step()
        hold(whole(model), family)


# -- FSDP2's options ---------------------------------------------------------------------------


def _options(rank: int, folder: Path) -> None:
    """bf16, activation checkpointing, accumulation and clipping: as W̃ that is kept by hand."""
    mesh = init_device_mesh("cpu", (2,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for policy, checkpointed, micro in (
        (half, False, 1), (MixedPrecisionPolicy(), True, 2), (half, True, 3)
    ):  # fmt: skip
        case, (n, m, _) = BY_ID["mdgf-linear"], reference.parse(MLP.pattern)

        def build(policy: Any = policy, checkpointed: bool = checkpointed) -> tuple[Any, Any]:
            model: Any = MLP.build(torch.float32)
            for i in (0, 2) if checkpointed else ():
                model[i] = checkpoint_wrapper(model[i])
            for child in model:
                if list(child.parameters()):
                    fully_shard(child, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            return model, torch.optim.AdamW(model.parameters(), lr=0.01)

        def backward(model: Any, xs: list[torch.Tensor]) -> None:
            for i, x in enumerate(xs):
                model.set_requires_gradient_sync(i == len(xs) - 1)
                (loss_of(model(x)) / len(xs)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        model, optimizer = build()
        attach(model, optimizer, case, MLP)
        plain, its = build()
        dense = {name: local(p).clone() for name, p in plain.named_parameters()}
        matrices = [name for name in dense if name.endswith("weight")]
        for k in range(TOTAL):
            frame = reference.frame_at(case, k, TOTAL, n, m, 16)
            with torch.no_grad():
                for name in matrices:
                    w, p = dense[name], local(plain.get_parameter(name))
                    kept = (
                        reference.keep(w, n, m) if frame else torch.ones_like(w, dtype=torch.bool)
                    )
                    p.copy_(torch.where(kept, w, w * (frame[2] if frame else 1.0)))
            assert_same(whole(model), whole(plain), f"step {k}")
            generator = torch.Generator().manual_seed(100 * k + rank)
            xs = [torch.randn(4, 16, generator=generator) for _ in range(micro)]
            backward(model, xs)
            backward(plain, xs)
            with torch.no_grad():
                for name in matrices:
                    local(plain.get_parameter(name)).copy_(dense[name])
            optimizer.step()
            its.step()
            dense = {name: local(p).clone() for name, p in plain.named_parameters()}
            optimizer.zero_grad()
            its.zero_grad()


def _offloaded(rank: int, folder: Path) -> None:
    """W on the host: FSDP2's own policy keeps parameters and state there."""
    mesh = init_device_mesh("cpu", (2,))
    for case in CASES[:2]:
        model = MLP.build()
        for child in (model[0], model[2], model):  # type: ignore[index]
            fully_shard(child, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        batches = [x.chunk(2)[rank] for x in MLP.batches(TOTAL)]
        _trains_as_alone(MLP, case, model, batches, f"offloaded {case}")


def _two(rank: int, folder: Path) -> None:
    _tensor_parallel(rank, folder)
    _expert_parallel(rank, folder)
    _options(rank, folder)
    _offloaded(rank, folder)


def test_two_processes(tmp_path: Path) -> None:
    launch(_two, tmp_path, 2)


# -- four processes ----------------------------------------------------------------------------


def _meshes(rank: int, folder: Path) -> None:
    """HSDP; and tensor parallel inside of FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    for case in CASES:
        batches = [x.chunk(4)[rank] for x in MLP.batches(TOTAL)]
        _trains_as_alone(MLP, case, shard(MLP.build(), mesh), batches, f"HSDP {case}")
        batches = [x.chunk(2)[mesh.get_local_rank("data")] for x in MLP.batches(TOTAL)]
        model = shard(parallel(MLP.build(), mesh["model"]), mesh["data"])
        _trains_as_alone(MLP, case, model, batches, f"FSDP2 over tensor parallel {case}")


@pytest.mark.slow
def test_meshes_of_four(tmp_path: Path) -> None:
    launch(_meshes, tmp_path, 4)


# -- another number of processes ---------------------------------------------------------------

STOP = 7
MOVED = [
    (FAMILY["encoder-layer"], "mdgf-frozen"), (FAMILY["fused-qkv"], "hybrid"), (MLP, "one-shot"),
    (_sums(3), "settling"), (MLP, "sr-ste"), (FAMILY["linear"], "gradual"),
]  # fmt: skip


class Sharded:
    """A run over every process of the group."""

    def __init__(self, family: Family, case: str, seed: int = 0) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = shard(family.build(seed=seed), mesh)
        self.optimizer = ADAMW(self.model.parameters())
        self.flow: Any = attach(self.model, self.optimizer, BY_ID[case], family)

    def train(self, batches: list[torch.Tensor]) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        train(self.model, self.flow, self.optimizer, [x.chunk(world)[rank] for x in batches])

    def state(self) -> dict[str, Any]:
        model, optimizer = dsd.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def dense(self) -> dict[str, torch.Tensor]:
        found = self.flow.dense_weights().items()
        return {n: (w.full_tensor() if isinstance(w, DTensor) else w).clone() for n, w in found}


def _saves(rank: int, folder: Path) -> None:
    for i, (family, case) in enumerate(MOVED):
        run, batches = Sharded(family, case), family.batches(TOTAL)
        run.train(batches[:STOP])
        dcp_save(run.state(), checkpoint_id=str(folder / f"{i}"))
        stopped, dense = whole(run.model), run.dense()
        run.train(batches[STOP:])
        if (last := whole(run.model)) and rank == 0:
            torch.save((stopped, dense, last), folder / f"{i}.pt")


def _resumes(rank: int, folder: Path) -> None:
    """W̃ and W bit-equal, and so the masks; what is summed over processes differs by rounding."""
    for i, (family, case) in enumerate(MOVED):
        what = f"{family.id} {case} on {dist.get_world_size()}"
        stopped, dense, last = torch.load(folder / f"{i}.pt")
        run = Sharded(family, case, seed=99)
        state = run.state()
        dcp_load(state, checkpoint_id=str(folder / f"{i}"))
        dsd.set_state_dict(
            run.model, run.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip
        assert run.flow.steps_done == STOP, what
        assert_same(whole(run.model), stopped, what)
        assert_same(run.dense(), dense, what)
        run.train(family.batches(TOTAL)[STOP:])
        agree(whole(run.model), last, what)


def _resumes_alone(rank: int, folder: Path) -> None:
    _resumes(rank, folder)


@pytest.mark.slow
def test_a_run_of_four_goes_on_on_two_and_on_one(tmp_path: Path) -> None:
    launch(_saves, tmp_path, 4)
    launch(_resumes, tmp_path, 2)
    launch(_resumes_alone, tmp_path, 1)


# -- W in bfloat16, rounded at random ----------------------------------------------------------


@pytest.mark.slow
def test_w_in_bfloat16_is_rounded_at_random_by_torchao() -> None:
    """As the same optimizer on W that is kept by hand, to the last bit."""
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    case, (n, m, _) = BY_ID["mdgf-linear"], reference.parse(MLP.pattern)
    model, plain = MLP.build(torch.bfloat16), MLP.build(torch.bfloat16)
    optimizer, its = (
        optim.AdamW8bit(net.parameters(), lr=1e-4, bf16_stochastic_round=True)
        for net in (model, plain)
    )
    flow = attach(model, optimizer, case, MLP)
    dense = {name: p.detach().clone() for name, p in plain.named_parameters()}
    start = copy.deepcopy(dense)
    for k, x in enumerate(MLP.batches(TOTAL, torch.bfloat16)):
        frame = reference.frame_at(case, k, TOTAL, n, m, 16)
        with torch.no_grad():
            for name, w in dense.items():
                if name.endswith("weight"):
                    kept, delta = reference.keep(w, n, m), frame[2] if frame else 1.0
                    plain.get_parameter(name).copy_(torch.where(kept, w, w * delta))
        assert_same(parameters_of(model), parameters_of(plain), f"step {k}")
        for net, one in ((model, optimizer), (plain, its)):
            one.zero_grad()
            loss_of(net(x)).backward()
            if net is plain:
                with torch.no_grad():
                    for name, w in dense.items():
                        net.get_parameter(name).copy_(w)
            torch.manual_seed(k)
            one.step()
        dense = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for name, w in flow.dense_weights().items():
        assert w.dtype == torch.bfloat16
        assert torch.equal(w, dense[name])
        assert not torch.equal(w, start[name])
