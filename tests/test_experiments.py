"""Experiments: configs, data, tasks, runs on the Trainer, their resume, and their mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import nmflow
from nmflow.errors import ConfigError, DataError, FlowError, NMFlowError
from nmflow.experiments import config, data, models, tasks
from nmflow.experiments.config import Data, Experiment, Model, Run, parse
from nmflow.experiments.results import MARK, RunFolder, write, write_json
from nmflow.experiments.runner import cores_of, run_all, share
from nmflow.experiments.tasks import vision
from nmflow.experiments.training import train
from nmflow.integrations.transformers import HardEvaluation, NMFlowCallback

ROOT = Path(__file__).parents[1]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10"
TINY: dict[str, Any] = {"n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 2}
DEMO: dict[str, Any] = {
    "task": "language-modelling",
    "options": {"length": 16},
    "data": {"source": "pydoc", "limit": 20_000},
    "model": {"kind": "gpt2", "fields": TINY},
    "pattern": "1:8",
    "training": {
        "steps": 24, "batch_size": 4, "learning_rate": 3e-3, "log_every": 4, "eval_every": 8,
        "save_every": 8, "eval_rows": 8, "track_every": 4, "device": "cpu",
    },
    "recipes": ["sr-ste"],
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def experiment(**change: Any) -> Experiment:
    return parse(Experiment, {**DEMO, **change}, "test")


def one(recipe: Any = "mdgf-exponential", seed: int = 0, **change: Any) -> Run:
    return next(experiment(recipes=[recipe], seeds=[seed], **change).runs())


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model" / "model.safetensors")


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainng": {}}, r"unknown key 'trainng': did you mean 'training'\?"),
        ({"training": {"steps": 4, "stepz": 1}}, r"'training\.stepz': did you mean 'steps'\?"),
        ({"training": {"steps": "four"}}, r"training\.steps is 'four'"),
        ({"training": {"steps": True}}, r"training\.steps is True"),
        ({"training": {"steps": 0}}, r"training\.steps is 0"),
        ({"training": {}}, r"the key 'training\.steps' is missing"),
        ({"task": "language-modeling"}, "did you mean 'language-modelling'"),
        ({"options": {"lenght": 3}}, "options: unknown key 'lenght': did you mean 'length'"),
        ({"recipes": ["srste"]}, "recipe is 'srste': choose one of"),
        ({"recipes": [{"name": "sr-ste", "lamm": 1}]}, "'lamm' is no option of sr-ste"),
        ({"recipes": [{"name": "mdgf-linear", "beta": -1.0}]}, "beta"),
        ({"pattern": "0:4"}, "pattern is '0:4'"),
        ({"pattern": {"ff": "5:4"}}, "pattern is '5:4'"),
        ({"data": {"source": "text"}}, "needs the key 'path'"),
        ({"data": {"source": "parquet"}}, "needs the key 'files'"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [-1]}, r"seeds\.0 is -1"),
        ({"model": {}}, "either 'kind'"),
    ],
)
def test_a_mistake_in_a_config_is_one_sentence(change: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        experiment(**change)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configs(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="no YAML at line 1"):
        config.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="holds a list"):
        config.load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load(tmp_path / "c.yaml")


def test_overrides_reach_any_key():
    found = config.load(ROOT / "configs" / "demo.yaml", ["training.steps=7", "seeds=[4]"])
    assert (found.training.steps, found.seeds) == (7, [4])
    with pytest.raises(ConfigError, match=r"write key\.path=value"):
        config.load(ROOT / "configs" / "demo.yaml", ["training.steps"])
    with pytest.raises(ConfigError, match="is a value"):
        config.load(ROOT / "configs" / "demo.yaml", ["task.kind=1"])


def test_runs_are_named_by_what_decides_their_outcome():
    runs = list(experiment(recipes=["sr-ste", "mdgf-linear"], seeds=[0, 1]).runs())
    assert len({run.id for run in runs}) == 4
    assert len({run.setting_hash for run in runs}) == 1
    again = list(experiment(recipes=["sr-ste", "mdgf-linear"], seeds=[0, 1], workers=3).runs())
    assert [run.id for run in again] == [run.id for run in runs]
    assert one("sr-ste", pattern="1:4").setting_hash != runs[0].setting_hash
    assert Run.model_validate_json(runs[0].model_dump_json()).id == runs[0].id


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_reads_and_names_a_network_that_exists(file: Path):
    raw = config.read(file)
    if "recipes" not in raw:
        pytest.skip("not the file of an experiment")
    found = parse(Experiment, raw, str(file))
    if found.model.kind is not None:
        assert set(found.model.fields) <= models.known_fields(found.model.kind)


# -- data and tasks -------------------------------------------------------------------------------


def test_the_text_is_split_once_and_its_hash_is_kept():
    found = data.corpus(Data(source="pydoc"))
    whole = "".join(found.texts[name] for name in data.SPLITS)
    assert len(whole) > 300_000
    assert found.card.sizes["test"] == pytest.approx(len(whole) / 10, abs=1)
    assert len(found.card.sha256) == 64
    assert data.corpus(Data(source="pydoc")).card == found.card


def test_a_text_file_and_a_folder_of_them(tmp_path: Path):
    (tmp_path / "a.txt").write_text("hello " * 100, encoding="utf-8")
    (tmp_path / "b.txt").write_text("world " * 100, encoding="utf-8")
    found = data.corpus(Data(source="text", path=str(tmp_path)))
    assert found.texts["train"].startswith("hello")
    assert "world" in found.texts["test"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no text"),
        (b"   \n", "holds no text"),
        (b"\xff\xff", "not UTF-8"),
        (b"a", "too few"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=said):
        data.corpus(Data(source="text", path=str(tmp_path / "a.txt")))


def test_a_missing_text_and_one_that_is_too_short(tmp_path: Path):
    with pytest.raises(DataError, match="No such file"):
        data.corpus(Data(source="text", path=str(tmp_path / "none.txt")))
    (tmp_path / "a.txt").write_text("short text " * 5)
    with pytest.raises(DataError, match=r"fewer than options\.length 16"):
        tasks.build(one(data={"source": "text", "path": str(tmp_path / "a.txt")}))


def test_digits_are_split_without_overlap():
    found = data.rows(Data(source="digits"))
    assert found.card.sizes == {"train": 1259, "validation": 269, "test": 269}
    seen = [np.asarray(found.splits[name]["image"]).reshape(-1, 64) for name in data.SPLITS]
    assert sum(len(part) for part in seen) == 1797


def png(value: int, size: int = 4) -> bytes:
    import io

    sink = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def parquet(folder: Path, labels: list[Any], images: list[Any] | None = None) -> Data:
    images = images or [{"bytes": png(9 * i), "path": None} for i in range(len(labels))]
    Dataset.from_dict({"image": images, "label": labels}).to_parquet(str(folder / "a.parquet"))
    return Data(source="parquet", files={"train": str(folder / "a.parquet")})


def pictures(source: Data, **options: Any) -> tasks.Problem:
    options = {"size": 4, **options}
    return tasks.build(
        one(
            task="image-classification", options=options, data=source.model_dump(),
            model={"kind": "vit", "fields": VIT},
        )
    )  # fmt: skip


def test_images_come_from_parquet(tmp_path: Path):
    problem = pictures(parquet(tmp_path, [0, 1] * 10))
    batch = problem.train.__getitems__([0, 1, 2])
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["labels"].tolist() == [0, 1, 0] or batch["labels"].max() <= 1
    assert problem.data.sizes == {"train": 16, "validation": 2, "test": 2}
    assert problem.model().config.num_labels == 2


def test_images_come_from_a_folder(tmp_path: Path):
    for name, value in (("cat", 10), ("dog", 200)):
        for i in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(png(value + i, 6))
    problem = pictures(Data(source="images", path=str(tmp_path)))
    assert problem.data.sizes["train"] == 16
    assert problem.model().config.num_labels == 2


def test_images_that_do_not_fit_into_memory_are_decoded_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = parquet(tmp_path, [0, 1] * 10)
    whole = pictures(source)
    vision._cached.cache_clear()
    monkeypatch.setattr(vision, "MEMORY", 0)
    lazy = pictures(source)
    vision._cached.cache_clear()
    assert isinstance(lazy.train.pixels, vision.Encoded)
    for a, b in zip(
        whole.train.__getitems__([3, 1]).values(),
        lazy.train.__getitems__([3, 1]).values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_augmentation_is_a_function_of_the_batch(tmp_path: Path):
    problem = pictures(parquet(tmp_path, [0, 1] * 10), augment="crop-flip", size=8)
    first, again = (problem.train.__getitems__([1, 5])["pixel_values"] for _ in range(2))
    assert torch.equal(first, again)
    assert problem.test.augment == "none"


@pytest.mark.parametrize(
    ("labels", "images", "said"),
    [
        ([0, 1, None, 1] * 5, None, r"label None at row \d+ of"),
        ([0, -1] * 10, None, r"label -1 at row \d+ of"),
        ([0, 1] * 10, [b"no image"] * 20, "undecodable image at row 0"),
    ],
)
def test_broken_images_and_labels_are_one_sentence(
    tmp_path: Path, labels: list[Any], images: list[Any] | None, said: str
):
    with pytest.raises(DataError, match=said):
        pictures(parquet(tmp_path, labels, images))


def test_a_label_that_training_does_not_know(tmp_path: Path):
    source = parquet(tmp_path, [0, 1] * 10)
    for name in ("validation", "test"):
        Dataset.from_dict(
            {"image": [{"bytes": png(3), "path": None}], "label": [7]}
        ).to_parquet(str(tmp_path / f"{name}.parquet"))  # fmt: skip
        source.files[name] = str(tmp_path / f"{name}.parquet")  # type: ignore[index]
    with pytest.raises(DataError, match="label 7 at row 0 of"):
        pictures(source)


def test_a_missing_column_and_a_file_that_is_no_parquet(tmp_path: Path):
    source = parquet(tmp_path, [0, 1] * 10)
    with pytest.raises(DataError, match=r"no column .kind. for the label.*image, label"):
        pictures(source.model_copy(update={"columns": {"label": "kind"}}))
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        data.rows(Data(source="parquet", files={"train": str(tmp_path / "b.parquet")}))
    with pytest.raises(DataError, match="No such file"):
        data.rows(Data(source="parquet", files={"train": str(tmp_path / "c.parquet")}))


@pytest.mark.data
def test_cifar_as_it_lies_beside_the_checkout():
    if not CIFAR.is_dir():
        pytest.skip("no CIFAR-10 beside the checkout")
    files = {split: str(CIFAR / f"{split}.parquet") for split in ("train", "test")}
    problem = pictures(Data(source="parquet", files=files, limit=64), size=32)  # type: ignore[arg-type]
    assert problem.test.__getitems__([0])["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"kind": "gpt3"}, r"model\.kind is 'gpt3'.*did you mean"),
        ({"kind": "gpt2", "fields": {"n_embed": 4}}, r"'model\.fields\.n_embed'.*did you mean"),
        ({"kind": "gpt2", "fields": {"n_embd": 30, "n_head": 4}}, "cannot be built"),
        ({"load": "/no/such/folder"}, r"model\.load is '/no/such/folder'"),
    ],
)
def test_a_network_that_cannot_be_built(model: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        models.build(Model.model_validate(model), AutoModelForCausalLM, {"vocab_size": 9})


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", ["dense", "sr-ste", "gradual", "mdgf-linear", "sdgf-geometric", "hybrid"]
)
def test_a_run_ends_as_an_audited_network(recipe: str, tmp_path: Path):
    run = one(recipe, training={**DEMO["training"], "noise_batches": 3})
    seen = []
    found = train(run, RunFolder(tmp_path), seen.append)
    assert found["audit"]["ok"] == (recipe != "dense")
    assert {"loss", "accuracy"} <= found["test"].keys()
    assert [row["step"] for row in found["history"] if "loss" in row] == [4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in found["history"] if "eval_loss" in row] == [8, 16, 24]
    held_out = {key for row in found["history"] for key in row if key.startswith("eval")}
    assert held_out == {"eval_loss", "eval_accuracy"}
    assert [row["step"] for row in found["tracked"]] == [0, 4, 8, 12, 16, 20]
    assert [row["step"] for row in found["noise"]] == [6, 12, 18, 24]
    assert found["history"][-1]["density"] == (1.0 if recipe == "dense" else 1 / 8)
    assert found["cost"]["run_training_flops"] > 0
    assert [now.step for now in seen][-1] == 24
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "config.json",
        "model",
        "result.json",
    ]
    # What is saved is what was evaluated.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    problem = tasks.build(run)
    batch = problem.test.__getitems__(list(range(len(problem.test))))
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(found["test"]["loss"], abs=1e-4)
    assert nmflow.audit(tmp_path / "model", "1:8", "ff").ok == (recipe != "dense")


def test_all_recipes_of_a_seed_start_alike_and_see_the_same_batches(
    tmp_path: Path, monkeypatch: Any
):
    from nmflow.experiments.tasks.lm import Windows

    orders: list[list[int]] = []
    plain = Windows.__getitems__

    def spy(self: Windows, indices: list[int]) -> Any:
        if self.views.stride(0) == 1:  # the training set
            orders[-1] += indices
        return plain(self, indices)

    monkeypatch.setattr(Windows, "__getitems__", spy)
    starts = []
    for recipe, seed in (("dense", 0), ("mdgf-linear", 0), ("mdgf-linear", 1)):
        orders.append([])
        found = train(one(recipe, seed), RunFolder(tmp_path / f"{recipe}{seed}"))
        starts.append(found["initial_sha256"])
    assert starts[0] == starts[1] != starts[2]
    assert orders[0] == orders[1] != orders[2]


def test_a_finished_run_is_not_run_again(tmp_path: Path):
    run = one()
    first = train(run, RunFolder(tmp_path))
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    assert train(run, RunFolder(tmp_path)) == json.loads(json.dumps(first))
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp


class Stop(NMFlowError):
    pass


@pytest.mark.parametrize(
    "recipe", ["sr-ste", "gradual", "mdgf-exponential", "sdgf-stepwise", "hybrid"]
)
@pytest.mark.parametrize("at", [8, 20])
def test_a_stopped_run_ends_bit_equal(recipe: str, at: int, tmp_path: Path):
    # Dropout draws random numbers, which a resume has to continue, too.
    fields = {**TINY, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    run = one(recipe, model={"kind": "gpt2", "fields": fields})
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    expected = train(run, whole)

    def stop(now: Any) -> None:
        if now.step == at and broken.last_checkpoint() is not None:
            raise Stop("here")

    def stop_after_save(now: Any) -> None:
        if now.step >= at + 4:
            raise Stop("here")

    with pytest.raises(Stop):
        train(run, broken, stop_after_save if at == 8 else stop)
    assert not broken.finished
    found = train(run, broken)
    assert found["resumed_at"] == [8 if at == 8 else 16]
    assert found["final_sha256"] == expected["final_sha256"]
    assert found["test"] == expected["test"]
    assert [r for r in found["history"] if "loss" in r] == [
        r for r in expected["history"] if "loss" in r
    ]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(broken)[name])


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    write_json(tmp_path / "checkpoint-8" / MARK, {"step": 8})
    assert folder.last_checkpoint() == tmp_path / "checkpoint-8"
    assert not (tmp_path / "checkpoint-16").exists()


def test_kill_nine_in_mid_run_then_the_same_command(tmp_path: Path):
    steps = {**DEMO["training"], "steps": 160, "save_every": 20, "track_every": 0}
    file = tmp_path / "a.yaml"
    raw = {**DEMO, "training": steps, "output": str(tmp_path / "runs"), "threads": 1}
    file.write_text(json.dumps(raw))
    command = [sys.executable, "-c", "import nmflow.cli; nmflow.cli.main()", "train", str(file)]
    run = next(config.load(file).runs())
    folder = RunFolder(tmp_path / "runs" / run.id)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not list(folder.path.glob(f"checkpoint-*/{MARK}")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not folder.finished
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    found = folder.result()
    assert found["resumed_at"]
    assert found["resumed_at"][0] % 20 == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(found["machine"]["threads"])
    expected = train(run, RunFolder(tmp_path / "whole"))
    torch.set_num_threads(threads)
    assert found["final_sha256"] == expected["final_sha256"]


def test_two_workers_train_what_one_does(tmp_path: Path):
    runs = list(experiment(recipes=["sr-ste", "mdgf-linear"], seeds=[0]).runs())
    seen = []
    assert run_all(runs, tmp_path / "two", workers=2, threads=1, notify=seen.append) == []
    assert {now.run for now in seen} == {run.id for run in runs}
    assert run_all(runs, tmp_path / "one", workers=1, threads=1) == []
    for run in runs:
        two, alone = (RunFolder(tmp_path / n / run.id).result() for n in ("two", "one"))
        assert two["final_sha256"] == alone["final_sha256"]


def test_a_run_that_fails_keeps_no_other_from_running(tmp_path: Path):
    runs = [one("sr-ste", remainder="error", pattern="1:7"), one("sr-ste")]
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        ((failed, sentence),) = run_all(runs, folder, workers=workers, threads=1)
        assert failed == runs[0].id
        assert "7" in sentence
        assert "\n" not in sentence
        assert not (folder / failed / "result.json").exists()
        assert RunFolder(folder / runs[1].id).finished


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    assert share(runs=3, workers=0, threads=0) == (3, 2)
    assert share(runs=99, workers=0, threads=0) == (8, 1)
    assert share(runs=99, workers=2, threads=0) == (2, 4)
    assert share(runs=0, workers=0, threads=0) == (1, 8)


def test_workers_have_cores_of_their_own_only_where_they_take_all():
    """A second sweep beside the first must not find its workers on the very same cores."""
    assert [cores_of(place, 2, 2, range(4)) for place in (0, 1)] == [[0, 1], [2, 3]]
    assert [cores_of(place, 3, 2, range(4)) for place in (0, 1, 2)] == [[0, 1], [2, 3], [0, 1]]
    assert [cores_of(place, 2, 1, range(4)) for place in (0, 1)] == [[0, 1, 2, 3]] * 2


# -- writing --------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.json", "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_written_may_be_read_by_others(tmp_path: Path):
    before = os.umask(0o022)
    try:
        write(tmp_path / "a.json", "{}")
        RunFolder(tmp_path).put_folder("model", lambda place: (place / "x").write_text(""))
    finally:
        os.umask(before)
    assert [oct((tmp_path / n).stat().st_mode & 0o777) for n in ("a.json", "model")] == [
        "0o644",
        "0o755",
    ]


def test_a_disk_that_fills_up_in_mid_run_is_one_sentence(tmp_path: Path):
    # No file may grow past a limit that result and config fit into, but no checkpoint.
    script = (
        "import resource, sys, pathlib\n"
        "from nmflow.errors import NMFlowError\n"
        "from nmflow.experiments.config import Run\n"
        "from nmflow.experiments.results import RunFolder\n"
        "from nmflow.experiments.training import train\n"
        "run = Run.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    train(run, RunFolder(sys.argv[2]))\n"
        "except NMFlowError as error:\n"
        "    sys.exit(f'one sentence: {error}')\n"
    )
    (tmp_path / "run.json").write_text(one().model_dump_json())
    command = [sys.executable, "-c", script, str(tmp_path / "run.json"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("one sentence: output is")
    assert "cannot be written" in done.stderr
    assert list((tmp_path / "run").glob("checkpoint-*")) == []
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_folder_that_is_a_file_cannot_be_written_to(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(one(), RunFolder(tmp_path / "runs" / "x"))


# -- the callback in anybody's Trainer ------------------------------------------------------------


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


def test_hard_evaluation_shows_the_final_pattern_in_mid_decay(tmp_path: Path):
    seen: list[tuple[bool, float]] = []

    class Watching(HardEvaluation, Trainer):
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


def test_a_pattern_needs_no_quotes_and_a_rate_no_point() -> None:
    from nmflow.experiments.reading import plain

    read = plain("{a: 1:16, b: [2:4, 1:16@64], c: 3e-3, d: 10, e: -1.5}", "here")
    assert read == {"a": "1:16", "b": ["2:4", "1:16@64"], "c": 0.003, "d": 10, "e": -1.5}
