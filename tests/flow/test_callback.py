"""The callback in anybody's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from transformers import Trainer, TrainingArguments

import nmflow
from nmflow.errors import FlowError
from nmflow.experiments import tasks
from nmflow.integrations.transformers import FinalMasksEvaluation, NMFlowCallback
from small_runs import one


def plain_trainer(
    tmp_path: Path, callback: NMFlowCallback, kind: Any = Trainer, **more: Any
) -> Any:
    problem = tasks.build(one())
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 12, "per_device_train_batch_size": 4,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 4,
        "save_strategy": "no", "remove_unused_columns": False, **more,
    }  # fmt: skip
    return kind(
        model=problem.model(),
        args=TrainingArguments(**arguments),
        train_dataset=problem.train,
        eval_dataset=problem.validation,
        data_collator=problem.collate,
        callbacks=[callback],
    )


def test_the_callback_needs_nothing_but_a_trainer(tmp_path: Path):
    callback = NMFlowCallback("mdgf-linear", "1:8", include="ff")
    trainer = plain_trainer(tmp_path, callback)
    before = {name: id(p) for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert callback.flow is not None
    assert (callback.flow.steps_done, callback.flow.total_steps) == (12, 12)
    assert nmflow.audit(trainer.model, "1:8", "ff").ok
    assert {name: id(p) for name, p in trainer.model.named_parameters()} == before
    deltas = [e["nmflow_delta"] for e in trainer.state.log_history if "loss" in e]
    assert deltas == sorted(deltas, reverse=True)
    assert deltas[-1] == 0


def test_the_callback_may_leave_the_last_word_to_the_user(tmp_path: Path):
    callback = NMFlowCallback("sr-ste", "1:8", include="ff", finalize=False)
    trainer = plain_trainer(tmp_path, callback)
    trainer.train()
    assert callback.live
    assert callback.flow is not None
    callback.flow.finalize()
    assert nmflow.audit(trainer.model, "1:8", "ff").ok


class Watched(NMFlowCallback):
    """Notes at every batch of an evaluation whether the network is N:M, and δ."""

    seen: list[tuple[bool, float]]

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.flow is not None
        ok = nmflow.audit(kwargs["model"], "1:16", "ff").ok
        self.seen.append((ok, self.flow.stage.delta))


def watched(**how: Any) -> Watched:
    callback = Watched("mdgf-linear", "1:16", include="ff", **how)
    callback.seen = []
    return callback


def test_the_callback_trains_with_its_defaults(tmp_path: Path):
    callback = NMFlowCallback()
    trainer = plain_trainer(tmp_path, callback)
    trainer.train()
    assert callback.flow is not None
    assert nmflow.audit(trainer.model, "1:16").ok
    assert (callback.flow.recipe.name, callback.flow.steps_done) == ("settling", 12)


@pytest.mark.parametrize("sets", [1, 2])
def test_a_plain_trainer_evaluates_the_final_masks(tmp_path: Path, sets: int):
    """Every batch of every data set, also before the first step; False turns it off."""
    ends = []
    for final_masks in (True, False):
        callback = watched(final_masks=final_masks)
        trainer = plain_trainer(
            tmp_path, callback, eval_strategy="steps", eval_steps=4, eval_on_start=True,
            save_strategy="steps", save_steps=4,
        )  # fmt: skip
        if sets == 2:
            trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
        trainer.train()
        assert len({delta for _, delta in callback.seen}) == 4
        assert all(ok for ok, _ in callback.seen) == final_masks
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))  # it only looks


def test_a_trainer_prolongs_a_run(tmp_path: Path):
    """`max_steps` of 12, then of 18 from its checkpoint in the decay."""
    first = plain_trainer(
        tmp_path, NMFlowCallback("mdgf-linear", "1:16", "ff", finalize=False),
        save_strategy="steps", save_steps=6,
    )  # fmt: skip
    first.train()
    callback = NMFlowCallback("mdgf-linear", "1:16", "ff")
    again = plain_trainer(tmp_path, callback, max_steps=18)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    flow = callback.flow
    assert flow is not None
    assert (flow.steps_done, flow.total_steps) == (18, 18)
    deltas = {e["step"]: e["nmflow_delta"] for e in first.state.log_history if "loss" in e}
    later = {e["step"]: e["nmflow_delta"] for e in again.state.log_history if "loss" in e}
    assert later[8] == deltas[8] > 0 == later[16]
    assert nmflow.audit(again.model, "1:16", "ff").ok


def test_final_masks_evaluation_shows_the_final_pattern_in_mid_decay(tmp_path: Path):
    seen: list[tuple[bool, float]] = []

    class Watching(FinalMasksEvaluation, Trainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            assert callback.flow is not None
            ok = nmflow.audit(self.model, "1:8", "ff").ok  # type: ignore[arg-type]
            seen.append((ok, callback.flow.stage.delta))
            return super().evaluation_loop(*args, **kwargs)

    callback = NMFlowCallback("mdgf-linear", "1:8", include="ff")
    trainer = plain_trainer(tmp_path, callback, Watching, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert [ok for ok, _ in seen] == [True] * 3
    assert seen[0][1] > 0.3
    trainer.evaluate()  # after finalize, too


def test_the_callback_refuses_the_best_model_at_the_end(tmp_path: Path):
    trainer = plain_trainer(
        tmp_path, NMFlowCallback("sr-ste", "1:8"), load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    with pytest.raises(FlowError, match="load_best_model_at_end"):
        trainer.train()
