"""The Lightning callback: a closure-driven loop, resume from a checkpoint, honest validation."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import nmflow
from nmflow.errors import FlowError, StateError

pl = pytest.importorskip("lightning.pytorch")

from nmflow.integrations.lightning import NMFlowCallback  # noqa: E402

STEPS = 12


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(16, 32)
        self.last = torch.nn.Linear(32, 4)
        self.seen: list[bool] = []

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return self.last(self.first(x).relu()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(nmflow.holds(self.first.weight, "1:8"))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(folder, callback, **how):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **how,
    )


def loader():
    """Half the steps: Lightning resumes exactly at the end of an epoch."""
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(STEPS // 2 * 4, 16))
    return torch.utils.data.DataLoader(data, batch_size=4, num_workers=0)


def callback(**how):
    return NMFlowCallback("mdgf-linear", "1:8", include="first", total_steps=STEPS, **how)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def test_fit_ends_at_the_pattern_and_validates_it(tmp_path):
    net = Net()
    trainer(tmp_path, callback(), max_epochs=2, val_check_interval=4, num_sanity_val_steps=0).fit(
        net, loader(), loader()
    )
    assert nmflow.holds(net.first.weight, "1:8")
    assert net.seen
    assert all(net.seen)


def test_the_defaults_train_and_the_switch_is_the_trainers(tmp_path):
    net, plain = Net(), Net()
    trainer(tmp_path, NMFlowCallback(exclude="last"), max_epochs=2).fit(net, loader())
    assert nmflow.holds(net.first.weight, "1:16")
    trainer(
        tmp_path, callback(final_masks=False), max_epochs=2, val_check_interval=2,
        num_sanity_val_steps=0,
    ).fit(plain, loader(), loader())  # fmt: skip
    assert not all(plain.seen)


def test_a_run_is_prolonged(tmp_path):
    first = Net()
    half = trainer(tmp_path, callback(finalize=False), max_epochs=1)
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    longer = NMFlowCallback("mdgf-linear", "1:8", include="first")
    net = Net()
    trainer(tmp_path, longer, max_epochs=3).fit(
        net, loader(), ckpt_path=str(tmp_path / "half.ckpt")
    )
    assert longer.flow is not None
    assert (longer.flow.steps_done, longer.flow.total_steps) == (STEPS * 3 // 2, STEPS * 3 // 2)
    assert nmflow.holds(net.first.weight, "1:8")


def test_resume_is_exact(tmp_path):
    whole = Net()
    trainer(tmp_path, callback(), max_epochs=2, enable_checkpointing=False).fit(whole, loader())

    first = Net()
    half = trainer(tmp_path, callback(finalize=False), max_epochs=1)
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Net()
    trainer(tmp_path, callback(), max_epochs=2, enable_checkpointing=False).fit(
        second, loader(), ckpt_path=str(tmp_path / "half.ckpt")
    )
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_checkpoint_is_a_final_one_and_goes_on(tmp_path):
    """Saved in mid-decay, right after a validation: N:M, and it resumes from W."""

    class Scored(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val", float(self.global_step))

    def fit(name, **how):
        keep = pl.callbacks.ModelCheckpoint(tmp_path, name, monitor="val", mode="min")
        net, run = Scored(), trainer(tmp_path, callback(), max_epochs=2, num_sanity_val_steps=0)
        run.callbacks.append(keep)
        run.fit(net, loader(), loader(), **how)
        return net

    whole = fit("best")
    best = torch.load(tmp_path / "best.ckpt", weights_only=False)
    assert (best["global_step"], nmflow.holds(best["state_dict"]["first.weight"], "1:8")) == (
        6,
        True,
    )
    saved = best["optimizer_states"][0]["state"][0]["nmflow_dense"]
    assert not nmflow.holds(saved, "1:8")
    again = fit("again", ckpt_path=str(tmp_path / "best.ckpt"))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_is_loaded_in_part_is_refused(tmp_path):
    class Lax(Net):
        """Loads what it finds."""

        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False

    half = trainer(tmp_path, callback(finalize=False), max_epochs=1)
    half.fit(Lax(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)
    saved["state_dict"]["final.bias"] = saved["state_dict"].pop("last.bias")
    torch.save(saved, tmp_path / "renamed.ckpt")
    # Older releases of Lightning read the whole file unasked.
    known = inspect.signature(pl.Trainer.fit).parameters
    whole = {"weights_only": False} if "weights_only" in known else {}
    with pytest.raises(StateError, match=r"1 of the network's 4 tensors .*\(last\.bias\)"):
        trainer(tmp_path, callback(), max_epochs=2, enable_checkpointing=False).fit(
            Lax(), loader(), ckpt_path=str(tmp_path / "renamed.ckpt"), **whole
        )


def test_a_trainer_without_an_end_is_refused(tmp_path):
    endless = NMFlowCallback("mdgf-linear", "1:8", include="first")
    with pytest.raises(FlowError, match="total_steps"):
        trainer(tmp_path, endless, max_epochs=-1, enable_checkpointing=False).fit(Net(), loader())


class Breaks(Net):
    """Raises once, at the second batch of the second epoch: in training, or in validation."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def training_step(self, batch, batch_idx):
        if self.where == "training" and (self.current_epoch, batch_idx) == (1, 2):
            self.where = ""
            raise RuntimeError("broken off")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.where == "validation" and (self.current_epoch, batch_idx) == (1, 2):
            self.where = ""
            raise RuntimeError("broken off")
        super().validation_step(batch, batch_idx)


def _fit(folder, net, one, **how):
    how = {"enable_checkpointing": False, "num_sanity_val_steps": 0, **how}
    path = how.pop("ckpt_path", None)
    trainer(folder, one, max_epochs=2, **how).fit(net, loader(), loader(), ckpt_path=path)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_training_that_was_broken_off_begins_anew_or_goes_on(tmp_path, where, resumed):
    net, one = Breaks(where), callback()
    with pytest.raises(RuntimeError, match="broken off"):
        _fit(tmp_path, net, one, enable_checkpointing=True)
    assert one.flow is not None
    dense = one.flow.dense_weights()["first.weight"].clone()
    other = Net()
    if resumed:
        (path,) = (str(p) for p in tmp_path.rglob("*.ckpt") if "epoch=0" in p.name)
        _fit(tmp_path, net, one, ckpt_path=path)
    else:
        other.load_state_dict({**net.state_dict(), "first.weight": dense})
        _fit(tmp_path, net, one)
    _fit(tmp_path, other, callback())
    assert nmflow.holds(net.first.weight, "1:8")
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_training_that_came_to_its_end_is_not_left(tmp_path):
    net, one = Net(), callback(finalize=False)
    _fit(tmp_path, net, one)
    with pytest.raises(FlowError, match="call finalize"):
        _fit(tmp_path, net, one)
    assert one.flow is not None
    assert one.flow.steps_done == STEPS


def test_a_checkpoint_without_a_recipe_is_no_resume(tmp_path):
    half = trainer(tmp_path, pl.Callback(), max_epochs=1, enable_checkpointing=False)
    half.fit(Net(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(StateError, match=r"of step 6 and holds no state of a recipe.*=6, the"):
        _fit(
            tmp_path,
            Net(),
            NMFlowCallback("settling", "1:8", include="first"),
            ckpt_path=str(tmp_path / "half.ckpt"),
        )
