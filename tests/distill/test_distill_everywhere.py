"""A distiller under autocast, a loss scaler, accumulation, Lightning, DDP and FSDP2."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nmflow
from nmflow.distill import Distiller, logit_loss
from nmflow.errors import DistillError
from processes import launch

transformers = pytest.importorskip("transformers")
gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)

STEPS = 4


def student(seed: int = 0) -> Any:
    """A GPT-2 without dropout, so that every way of running it is the same."""
    torch.manual_seed(seed)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, **still
    )
    return transformers.GPT2LMHeadModel(config)


def batches(count: int = STEPS, rows: int = 4) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(5)
    out = [torch.randint(0, 20, (rows, 6), generator=made) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in out]


def flow_of(model: nn.Module, steps: int = STEPS) -> tuple[torch.optim.Optimizer, nmflow.Flow]:
    # Not Adam: a key's bias has no gradient but rounding, of which Adam makes whole steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    how: dict[str, Any] = {"include": "ff", "total_steps": steps}
    return optimizer, nmflow.attach(model, optimizer, "mdgf-linear", "1:4", **how)


def own_loop(hidden: float = 1.0, parts: int = 1) -> Any:
    """One process; each batch's loss is the mean of those of its parts."""
    model = student()
    distiller = Distiller(student(1), hidden=hidden)
    optimizer, flow = flow_of(model)
    for batch in batches():
        optimizer.zero_grad()
        for i in range(parts):
            piece = {name: value.chunk(parts)[i] for name, value in batch.items()}
            (distiller(model, piece).loss / parts).backward()
        optimizer.step()
    flow.finalize()
    return model


def assert_alike(model: Any, other: Any, atol: float = 1e-6) -> None:
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, p), q in pairs:
        assert torch.allclose(p, q, atol=atol), name


def test_accumulated_parts_are_the_whole_batch_for_losses_that_are_means():
    assert_alike(own_loop(hidden=0.0, parts=2), own_loop(hidden=0.0), atol=1e-5)


def test_the_teacher_runs_under_the_callers_autocast():
    model, teacher, batch = student(), student(1), batches()[0]
    distiller = Distiller(teacher, task=0.0, logits=1.0, hidden=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = distiller(model, batch).loss
        with torch.no_grad():
            s, t = (m(batch["input_ids"]).logits for m in (model, teacher))
    assert t.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(logit_loss(s[:, :-1], t[:, :-1]).item(), rel=1e-5)


def dtypes_of(teacher: nn.Module) -> set[torch.dtype]:
    """The dtypes of what the teacher's first block says, filled as it runs."""
    seen: set[torch.dtype] = set()
    first: nn.Module = cast(Any, teacher).transformer.h[0].mlp
    first.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    return seen


def run_a_trainer(folder: Path, distiller: Distiller, half: bool) -> None:
    from nmflow.integrations.distillation import Distillation

    class Student(Distillation, transformers.Trainer):
        pass

    rows = [{name: x[0] for name, x in batch.items()} for batch in batches()]
    args = transformers.TrainingArguments(
        str(folder), max_steps=2, bf16=half, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = cast(Any, Student)(student(), args, train_dataset=rows)
    trainer.distiller = distiller
    trainer.train()


def accelerator_of(half: bool) -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # a process has one precision otherwise
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16" if half else "no")


def run_accelerate(folder: Path, distiller: Distiller, half: bool) -> None:
    accelerator = accelerator_of(half)
    model = accelerator.prepare(student())
    with accelerator.autocast():
        loss = distiller(model, batches()[0]).loss
    accelerator.backward(loss)


def run_lightning(folder: Path, distiller: Distiller, half: bool) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = student()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return distiller(self.model, batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, enable_checkpointing=False,
        precision="bf16-mixed" if half else "32-true",
    ).fit(Net(), torch.utils.data.DataLoader(cast(Any, batches()), batch_size=None))  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("run", [run_a_trainer, run_accelerate, run_lightning])
def test_the_teacher_has_the_precision_of_the_student(
    run: Any, half: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = student(1)
    seen = dtypes_of(teacher)
    run(tmp_path, Distiller(teacher), half)
    assert seen == {torch.bfloat16 if half else torch.float32}
    assert "teacher" not in caplog.text


def test_a_teacher_that_mixed_precision_does_not_reach_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    accelerator = accelerator_of(half=True)
    model, distiller = accelerator.prepare(student()), Distiller(student(1))
    for _ in range(2):
        distiller(model, batches()[0])
    assert caplog.text.count("call the distiller under accelerator.autocast()") == 1


def test_a_loss_scaler_scales_the_whole_loss():
    grads = []
    for scale in (1.0, 1024.0):
        model = student()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(Distiller(student(1))(model, batches()[0]).loss).backward()
        scaler.unscale_(optimizer)
        grads.append([cast(Tensor, p.grad).clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_lightning_trains_as_an_own_loop_does(tmp_path: Path):
    pl = pytest.importorskip("lightning.pytorch")
    from nmflow.integrations.lightning import NMFlowCallback

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = student()
            self.distiller = Distiller(student(1))  # no module: not trained, and not saved

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.distiller(self.model, batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    net = Net()
    callback = NMFlowCallback("mdgf-linear", "1:4", include="ff", total_steps=STEPS)
    loader = torch.utils.data.DataLoader(cast(Any, batches()), batch_size=None)
    pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], max_epochs=1,
    ).fit(net, loader)  # fmt: skip
    assert_alike(net.model, own_loop(), atol=0.0)
    assert not any("teacher" in name for name in net.state_dict())


def test_a_teacher_is_not_taken_of_what_is_sparse_already():
    model = student()
    _, flow = flow_of(model)
    with pytest.raises(DistillError, match=r"before nmflow\.attach"):
        Distiller.of(model)
    flow.finalize()
    Distiller.of(model)


# -- two processes ------------------------------------------------------------------------------


def _half(rank: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.chunk(2)[rank] for name, value in batch.items()}


def _has_the_mean_gradient(rank: int, model: Any, distiller: Distiller) -> None:
    """The gradient of the mean of both halves' losses; then it trains to its pattern."""
    alone, teacher, batch = student(), Distiller(student(1)), batches()[0]
    for half in (0, 1):
        (teacher(alone, _half(half, batch)).loss / 2).backward()
    distiller(model, _half(rank, batch)).loss.backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        found: Any = p.grad
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert torch.allclose(found, cast(Tensor, q.grad), atol=1e-6), name
    optimizer, flow = flow_of(model)
    for batch in batches():
        optimizer.zero_grad()
        distiller(model, _half(rank, batch)).loss.backward()
        optimizer.step()
    flow.finalize()
    assert nmflow.audit(model, "1:4", include="ff").ok


def _ddp(rank: int, folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(student())
    copied = Distiller.of(model).teacher  # of what is inside
    assert not isinstance(copied, DistributedDataParallel)
    _has_the_mean_gradient(rank, model, Distiller(student(1)))


def _fsdp2(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    for sharded_teacher in (False, True):
        model, teacher = student(), student(1)
        for one in (model, teacher) if sharded_teacher else (model,):
            for block in one.transformer.h:
                fully_shard(block)
            fully_shard(one)
        with pytest.raises(DistillError, match="before it is sharded"):
            Distiller.of(model)
        _has_the_mean_gradient(rank, model, Distiller(teacher))


def _trainer(folder: Path, micro: int) -> Any:
    """Two steps of SGD of a `Trainer` on batches of 4 rows over all processes."""
    from nmflow.integrations.distillation import Distillation

    class Student(Distillation, transformers.Trainer):
        pass

    batch = batches(1)[0]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :4] = -100  # so that rows count unequally
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    model = student()
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=micro, max_steps=2, learning_rate=0.1,
        optim="sgd", max_grad_norm=0, report_to=[], disable_tqdm=True, save_strategy="no",
        use_cpu=True, ddp_backend="gloo" if dist.is_initialized() else None,
    )  # fmt: skip
    trainer = cast(Any, Student)(model, args, train_dataset=rows)
    trainer.distiller = Distiller(student(1), hidden=0.0)
    trainer.train()
    return model


def _trainer_of_two(rank: int, folder: Path) -> None:
    # The numerator of each term is a mean over this process's positions, weighted by its share.
    found = _trainer(folder, 2)
    wanted = torch.load(folder / "alone.pt", weights_only=True)
    for name, value in found.state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-5), name


CHECKS = {"ddp": _ddp, "fsdp2": _fsdp2, "trainer": _trainer_of_two}


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text(),
    }  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for check in CHECKS.values():
        check(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


@gloo
def test_two_processes_train_as_one_does_with_the_mean_of_their_losses(tmp_path: Path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.save(copy.deepcopy(_trainer(tmp_path, 4).state_dict()), tmp_path / "alone.pt")
    launch(_process, tmp_path)
