"""The figures of a run reach TensorBoard, MLflow and others, and are read back from their files."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import nmflow
from harness import Run
from models import BY_ID as FAMILY
from nmflow.integrations.metrics import PHASES, Metrics, figures
from nmflow.select.target import rows_of
from settings import BY_ID, CASES, TOTAL, Case

NUMBERS = ("delta", "density", "pattern_n", "pattern_m", "phase_number")
SEEN = ("flip_rate", "noise_kept", "noise_pruned")
OURS = {f"nmflow_{name}" for name in (*NUMBERS, *SEEN)}


# -- the figures -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mdgf-linear", "hybrid", "sr-ste", "one-shot", "dense"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_figures_are_those_of_the_tracker(case: str, every: int) -> None:
    """And they change nothing."""
    family = FAMILY["encoder-layer"]
    run, plain = Run(family, BY_ID[case]), Run(family, BY_ID[case])
    metrics, tracker = (
        Metrics(run.flow, every=every),
        nmflow.track(run.flow, every=every, per_target=False),
    )
    assert not set(metrics()) & {f"nmflow_{name}" for name in SEEN}
    for x in family.batches(8):
        run.step(x)
        plain.step(x)
        found, row, stage = metrics(), tracker.rows[-1], run.flow.stage
        assert found["nmflow_delta"] == stage.delta
        assert PHASES[int(found["nmflow_phase_number"])] == stage.phase
        assert found.get("nmflow_flip_rate") == row["flip_rate"]
        for part in ("kept", "pruned"):
            want = row[f"grad_var_{part}"]
            assert found[f"nmflow_noise_{part}"] == pytest.approx(want, rel=1e-6, abs=1e-18)
        patterns = [p for p in stage.patterns.values() if p]
        low = min(patterns, key=lambda p: p.density) if patterns else nmflow.Pattern("1:1")
        assert (found["nmflow_pattern_n"], found["nmflow_pattern_m"]) == (low.n, low.m)
        assert all(type(value) in (int, float) for value in found.values())
    for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_distance_and_density_are_those_of_what_the_network_shows(case: Case) -> None:
    """Of every recipe, whatever it does to the weights that it keeps, and of every held mask."""
    family = FAMILY["encoder-layer"]
    run = Run(family, case)
    tracker = nmflow.track(run.flow)
    for x in family.batches(TOTAL):
        k, density = run.flow.steps_done, figures(run.flow)["nmflow_density"]
        dense = {n: w.detach().clone() for n, w in run.flow.dense_weights().items()}
        shown = {n: run.model.get_parameter(n).detach().clone() for n in dense}
        run.step(x)
        rows = {row["target"]: row for row in tracker.rows if row["step"] == k}
        for target in run.flow.plan:
            w, s = (rows_of(t[target.name], target).double() for t in (dense, shown))
            want = float((w - s).norm() / w.norm())
            assert rows[target.label]["distance"] == pytest.approx(want, rel=1e-9, abs=1e-12)
        kept = rows["all"]["kept"] / rows["all"]["weights"]
        if rows["all"]["phase"] != "dense":  # where the final masks are told
            # A share of whole groups is rounded down to a number of them, in each target.
            assert density == pytest.approx(kept, abs=0.05 if run.flow.recipe.form else 1e-12)


def test_a_step_that_waits_for_another_optimizer_holds_no_tensor() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 16))
    each = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    flow = nmflow.attach(model, each, "ste", "1:4", include="*", total_steps=5)
    tracker = nmflow.track(flow, per_target=False)
    grads = []
    for _ in range(3):  # the other optimizer steps later, or never
        model(torch.randn(4, 16)).square().mean().backward()
        grads.append(weakref.ref(model[0].weight.grad))
        each[0].step()
        each[0].zero_grad()
    gc.collect()
    assert not tracker.rows
    assert [ref() for ref in grads] == [None] * 3


def test_two_optimizers_make_one_figure() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 16))
    each = [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in model]
    flow = nmflow.attach(model, each, "ste", "1:4", include="*", total_steps=5)
    metrics, tracker = Metrics(flow), nmflow.track(flow, per_target=False)
    for _ in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        for optimizer in each:
            optimizer.step()
    assert metrics()["nmflow_flip_rate"] == tracker.rows[-1]["flip_rate"] > 0
    assert metrics()["nmflow_noise_kept"] == pytest.approx(tracker.rows[-1]["grad_var_kept"])


# -- their files -------------------------------------------------------------------------------


def of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in a folder of TensorBoard's: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore
        EventAccumulator,
    )

    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.*"):
        read = EventAccumulator(str(file)).Reload()
        for name in read.Tags()["scalars"]:
            found[name] = [(e.step, e.value) for e in read.Scalars(name)]
    return found


def of_mlflow(store: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric in a store of MLflow's."""
    from mlflow.tracking import MlflowClient  # pyright: ignore

    client = MlflowClient(tracking_uri=store)
    found: dict[str, list[tuple[int, float]]] = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            for name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                found[name] = sorted((m.step, m.value) for m in history)
    return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: no file to read back")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")
    mlflow.set_tracking_uri(uri)
    return uri


def tensorboard() -> Any:
    return pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def check(found: dict[str, list[tuple[int, float]]], prefix: str = "") -> None:
    """All figures are there, and say what a decay to 1:8 is."""
    named = {name.removeprefix(prefix): values for name, values in found.items()}
    assert set(named) >= OURS
    deltas = [value for _, value in named["nmflow_delta"]]
    assert deltas[0] > 0
    assert deltas == sorted(deltas, reverse=True)
    assert named["nmflow_density"][-1][1] == 1 / 8
    assert named["nmflow_pattern_m"][-1][1] == 8
    assert any(value > 0 for _, value in named["nmflow_flip_rate"])
    assert all(value > 0 for _, value in named["nmflow_noise_kept"])


class TestTrainer:
    """`Trainer`, by its own `report_to`."""

    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("transformers")
        pytest.importorskip("datasets")

    def train(self, folder: Path, report_to: str) -> Any:
        from test_callback import plain_trainer

        from nmflow.integrations.transformers import NMFlowCallback

        callback = NMFlowCallback("mdgf-linear", "1:8", include="ff")
        trainer = plain_trainer(folder, callback, report_to=report_to, logging_steps=2)
        trainer.train()
        return trainer

    def test_whatever_a_tracker_sees_the_history_keeps(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import TrainerCallback
        from transformers.integrations import integration_utils

        entries: list[dict[str, Any]] = []

        class Tracker(TrainerCallback):
            """Keeps what it is given when it is called, as W&B's does."""

            def on_log(self, args: Any, state: Any, *_: Any, logs: Any = None, **__: Any) -> None:
                entries.append({"step": state.global_step, **logs})

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "made-up", Tracker)
        trainer = self.train(tmp_path, "made-up")
        losses = [entry for entry in entries if "loss" in entry]
        assert [entry["step"] for entry in losses] == [2, 4, 6, 8, 10, 12]
        kept = [entry for entry in trainer.state.log_history if "loss" in entry]
        for seen, held in zip(losses, kept, strict=True):
            given = {name: held[name] for name in OURS if name in held}
            assert {name: seen.get(name) for name in given} == given
            assert all(isinstance(value, int | float) for value in given.values())
            assert PHASES[held["nmflow_phase_number"]] == held["nmflow_phase"]
            assert held["nmflow_pattern"] in ("dense", "1:8")
        assert ["nmflow_flip_rate" in entry for entry in losses] == [False] + [True] * 5
        assert losses[0]["nmflow_delta"] > losses[-1]["nmflow_delta"] == 0
        assert sum(type(c).__name__ == "NMFlowCallback" for c in _callbacks(trainer)) == 1

    def test_tensorboard(self, tmp_path: Path) -> None:
        tensorboard()
        self.train(tmp_path, "tensorboard")
        check(of_tensorboard(tmp_path), "train/")

    @pytest.mark.slow
    def test_mlflow(self, tmp_path: Path, store: str) -> None:
        self.train(tmp_path, "mlflow")
        check(of_mlflow(store))


def _callbacks(trainer: Any) -> list[Any]:
    return trainer.callback_handler.callbacks


class TestLightning:
    """Lightning, by the trainer's loggers."""

    def train(self, folder: Path, logger: Any) -> None:
        pl = pytest.importorskip("lightning.pytorch")
        from test_lightning import Net, loader

        from nmflow.integrations.lightning import NMFlowCallback

        pl.Trainer(
            default_root_dir=folder, accelerator="cpu", logger=logger, log_every_n_steps=2,
            enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
            callbacks=[NMFlowCallback("mdgf-linear", "1:8", include="first")],
        ).fit(Net(), loader())  # fmt: skip

    @pytest.mark.filterwarnings("ignore")
    def test_tensorboard(self, tmp_path: Path) -> None:
        tensorboard()
        loggers = pytest.importorskip("lightning.pytorch.loggers")
        self.train(tmp_path, loggers.TensorBoardLogger(tmp_path))
        found = of_tensorboard(tmp_path)
        check(found)
        assert [step for step, _ in found["nmflow_delta"]] == [1, 3, 5, 7, 9, 11]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.slow
    def test_mlflow(self, tmp_path: Path, store: str) -> None:
        loggers = pytest.importorskip("lightning.pytorch.loggers")
        self.train(tmp_path, loggers.MLFlowLogger(tracking_uri=store))
        check(of_mlflow(store))


@pytest.mark.parametrize("tracker", ["tensorboard", pytest.param("mlflow", marks=pytest.mark.slow)])
def test_accelerate(tracker: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A loop of Accelerate's, whose `log` is a call."""
    accelerate = pytest.importorskip("accelerate")
    store = request.getfixturevalue("store") if tracker == "mlflow" else tensorboard() and ""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker, project_dir=tmp_path)
    model, optimizer = accelerator.prepare(model, optimizer)
    flow = nmflow.attach(model, optimizer, "mdgf-linear", "1:8", include="*", total_steps=12)
    metrics = Metrics(flow, every=2)
    accelerator.init_trackers("run")
    for step in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 16)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        if step % 2:
            accelerator.log({"loss": loss.item(), **metrics()}, step=step)
    accelerator.end_training()
    check(of_mlflow(store) if store else of_tensorboard(tmp_path))
