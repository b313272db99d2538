"""The callback in anybody's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import nmflow
from nmflow import native
from nmflow.errors import FlowError, StateError
from nmflow.experiments import tasks
from nmflow.integrations.transformers import (
    ExactCheckpoints,
    FinalMasksEvaluation,
    NMFlowCallback,
)
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


class Breaks(NMFlowCallback):
    """Raises once: as step 7 begins, or in the evaluation after step 8."""

    def __init__(self, where: str, error: type[BaseException], **how: Any) -> None:
        super().__init__("settling", "1:8", include="ff", **how)
        self.where, self.error = where, error

    def break_at(self, where: str, step: int, state: Any) -> None:
        if where == self.where and state.global_step == step:
            self.where = ""
            raise self.error("broken off")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self.break_at("step", 7, state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.break_at("evaluation", 8, state)


class Exact(ExactCheckpoints, FinalMasksEvaluation, Trainer):
    pass


EVERY_4 = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
BREAKS = [("step", KeyboardInterrupt), ("step", RuntimeError), ("evaluation", RuntimeError)]


def _broken(place: Path, callback: NMFlowCallback, **more: Any) -> Any:
    """A trainer whose training was broken off, of few rows to evaluate."""
    trainer = plain_trainer(place, callback, Exact, **EVERY_4, **more)
    trainer.eval_dataset = torch.utils.data.Subset(trainer.eval_dataset, range(8))
    if isinstance(callback, Breaks) and callback.where:
        with pytest.raises(callback.error, match="broken off"):
            trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("where", "error", "sparse_steps"),
    [(*each, sparse) for each, sparse in zip(BREAKS, ("off", "on", "off"), strict=True)],
)
def test_a_training_that_was_broken_off_begins_with_its_dense_weights(
    tmp_path: Path, where: str, error: type[BaseException], sparse_steps: Any
) -> None:
    """As another Trainer would whose network is given W, all of it."""
    how = {"sparse_steps": sparse_steps, "freeze_mask": True}
    callback = Breaks(where, error, **how)
    trainer = _broken(tmp_path / "one", callback, optim="sgd")
    assert callback.flow is not None
    dense = {name: w.clone() for name, w in callback.flow.dense_weights().items()}
    other = _broken(tmp_path / "other", Breaks("", error, **how), optim="sgd")
    other.model.load_state_dict({**trainer.model.state_dict(), **dense})
    for each in (trainer, other):
        torch.manual_seed(0)
        each.train()
    assert nmflow.audit(trainer.model, "1:8", "ff").ok
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert not any("nmflow" in str(key) for s in trainer.optimizer.state.values() for key in s)


@pytest.mark.parametrize(
    ("where", "error", "steps"), [(*BREAKS[1], 16), (*BREAKS[2], 12)], ids=["prolonged", "same"]
)
def test_a_training_that_was_broken_off_is_resumed_exactly(
    tmp_path: Path, where: str, error: type[BaseException], steps: int
) -> None:
    """As one that never stopped; with more steps than before, as another Trainer prolongs it."""
    trainer = _broken(tmp_path / "broken", Breaks(where, error))
    last = str(tmp_path / "broken" / "checkpoint-4")
    other = _broken(tmp_path / "other", Breaks("", error), max_steps=steps)
    other.train(resume_from_checkpoint=None if steps == 12 else last)
    trainer.args.max_steps = steps
    trainer.train(resume_from_checkpoint=last)
    assert nmflow.audit(trainer.model, "1:8", "ff").ok
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("ended", [True, False], ids=["its end", "another network"])
def test_a_training_that_is_not_to_be_lost_is_not_left(tmp_path: Path, ended: bool) -> None:
    callback = Breaks("" if ended else "step", RuntimeError, finalize=False)
    trainer = plain_trainer(tmp_path, callback)
    if ended:
        trainer.train()
    else:
        with pytest.raises(RuntimeError, match="broken off"):
            trainer.train()
        trainer = plain_trainer(tmp_path, callback)
    with pytest.raises(FlowError, match="give every training one of its own"):
        trainer.train()


@pytest.mark.parametrize("kept", ["weights alone", "a dense run"])
def test_a_checkpoint_without_a_recipe_is_no_resume(tmp_path: Path, kept: str) -> None:
    """What Trainer restores in part, or without a recipe, would be N:M at the end by force."""
    first = NMFlowCallback("settling" if kept == "weights alone" else "dense", "1:8", include="ff")
    only = kept == "weights alone"
    how = {**EVERY_4, "save_only_model": only}
    trainer = plain_trainer(tmp_path, first, **how)
    if not only:
        trainer.remove_callback(first)
    trainer.train()
    place = str(tmp_path / "checkpoint-4")

    trainer = plain_trainer(tmp_path, NMFlowCallback("settling", "1:8", include="ff"), **how)
    before = len(trainer.callback_handler.callbacks)
    with pytest.raises(StateError, match=r"of step 4 and holds no state of a recipe.*=8, the"):
        trainer.train(resume_from_checkpoint=place)
    assert len(trainer.callback_handler.callbacks) == before

    left = NMFlowCallback("settling", "1:8", include="ff", total_steps=8)
    plain_trainer(tmp_path, left, **how).train(resume_from_checkpoint=place)
    assert left.flow is not None
    assert (left.flow.steps_done, left.flow.total_steps) == (8, 8)


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


def best_of(tmp_path: Path, callback: NMFlowCallback, kind: Any = Trainer, **more: Any) -> Any:
    """A `Trainer` whose best network is that of step 4, in mid-decay, by its figure."""
    steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = plain_trainer(
        tmp_path, callback, kind, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=False, **{**steps, **more},
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"score": float(trainer.state.global_step)}
    return trainer


SLOW = pytest.mark.slow
BESTS = [("mdgf-linear", Trainer), ("one-shot", Exact)]
MORE = [("settling", Trainer), ("settling", Exact), ("sr-ste", Exact), ("one-shot", Trainer)]
MORE += [("gradual", Exact), ("gradual", Trainer), ("dense", Exact), ("dense", Trainer)]


@pytest.mark.parametrize(
    ("recipe", "kind"), [*BESTS, *(pytest.param(*pair, marks=SLOW) for pair in MORE)]
)
def test_the_best_model_at_the_end_is_a_final_one(tmp_path: Path, recipe: Any, kind: Any) -> None:
    trainer = best_of(tmp_path, NMFlowCallback(recipe, "1:8", include="ff"), kind)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in best.items())
    assert (recipe == "dense") != nmflow.audit(trainer.model, "1:8", "ff").ok


def test_the_best_model_of_a_run_that_stopped_early(tmp_path: Path) -> None:
    trainer = best_of(tmp_path, NMFlowCallback("mdgf-linear", "1:8", include="ff"), max_steps=40)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert trainer.state.global_step == 8
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], weight) for name, weight in best.items())
    assert nmflow.audit(trainer.model, "1:8", "ff").ok


def test_a_best_model_that_is_loaded_in_part_is_refused(tmp_path: Path) -> None:
    class Lax(Trainer):
        def _load_best_model(self) -> None:
            super()._load_best_model()
            with torch.no_grad():
                self.model.get_parameter("transformer.wte.weight").add_(1.0)  # type: ignore

    trainer = best_of(tmp_path, NMFlowCallback("mdgf-linear", "1:8", include="ff"), Lax)
    with pytest.raises(StateError, match=r"transformer\.wte\.weight"):
        trainer.train()


def test_the_best_model_of_mid_decay_is_refused(tmp_path: Path) -> None:
    trainer = best_of(tmp_path, NMFlowCallback("sr-ste", "1:8", final_masks=False))
    with pytest.raises(FlowError, match=r"load_best_model_at_end.*final_masks"):
        trainer.train()


def test_layers_of_a_trainer_run_on_kept_places(tmp_path: Path) -> None:
    """The steps of the frozen phase; under the Trainer's clipping, which sees their norm."""
    callback = NMFlowCallback(
        nmflow.Settling(dense=0, finetune=6), "1:4", "ff", freeze_mask=True, sparse_steps="on"
    )
    trainer = plain_trainer(tmp_path, callback)  # whose figures look at gradients every 4 steps
    seen: list[int] = []
    step = type(trainer).training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert callback.flow is not None
        seen.append(sum(layer.sparse for layer in callback.flow.explain().layers))
        return step(self, *args, **kwargs)

    trainer.training_step = counted.__get__(trainer)
    trainer.train()
    targets = len(nmflow.plan(trainer.model, "1:4", "ff"))
    served = native.available() and native.isa() != "portable"
    there = targets if served else 0
    assert seen == [0] * 6 + [there, there, 0, there, there, there]
    assert all(type(m).__name__ != "KeptLinear" for m in trainer.model.modules())
