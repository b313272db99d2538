"""Tasks: scores, answers, tokenisers, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from nmflow.errors import ConfigError
from nmflow.experiments import tasks
from nmflow.experiments.data.tokenization import Tokens, learnt, tokenizer
from nmflow.experiments.tasks import _text, glue
from small_systems import SYSTEMS, run_of

pytestmark = pytest.mark.usefixtures("own_cache")
WORDS = ("good", "bad", "film", "plot", "the", "a", "very", "not", "is", "was")


def test_scores_are_those_of_glue() -> None:
    true = np.array([0, 1, 1, 0, 1])
    said = np.array([0, 1, 0, 0, -1])  # -1: no label's word, wrong
    found = glue.scores("mrpc", said, true)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 1 / (2 * 1 + 0 + 2))
    # Matthews by its definition, from the table of true and false.
    tp, tn, fp, fn = 1, 2, 0, 2
    wanted = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert glue.scores("cola", said, true)["matthews"] == pytest.approx(wanted)


def test_pooled_scores_are_the_mean_of_the_tasks() -> None:
    places, true = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = glue.summary(("sst2", "mrpc"), places, np.array([0, 0, 1, 0]), true)
    assert found["sst2_accuracy"] == 0.5
    assert found["mrpc_accuracy"] == 0.5
    assert found["mrpc_f1"] == pytest.approx(2 / 3)
    assert found["score"] == pytest.approx((0.5 + (0.5 + 2 / 3) / 2) / 2)


def test_a_pooled_classifier_answers_within_the_task(tmp_path: Path) -> None:
    run = run_of(SYSTEMS["bert pooled"], tmp_path)
    problem = tasks.build(run)
    logits = torch.tensor([[9.0, 8, 1, 2, 0, 0], [9.0, 8, 1, 2, 0, 0], [0, 0, 9, 9, 4, 5]])
    labels = torch.tensor([1, 2, 4])  # of cola, mrpc and rte
    assert problem.reduce is not None
    assert problem.reduce(logits, labels).tolist() == [0, 3, 5]


def test_answers_are_told_by_their_words(tmp_path: Path) -> None:
    problem = tasks.build(run_of(SYSTEMS["t5"], tmp_path))
    rows = [problem.test[i] for i in range(len(problem.test))]
    batch = problem.collate(rows)

    class Prediction:
        inputs, label_ids = batch["input_ids"].numpy(), batch["labels"].numpy()
        predictions = label_ids

    assert problem.metrics(Prediction())["score"] == 1.0  # type: ignore[arg-type]
    Prediction.predictions = np.zeros_like(Prediction.label_ids)
    assert problem.metrics(Prediction())["cola_accuracy"] == 0.0  # type: ignore[arg-type]


def test_bleu_is_that_of_sacrebleu(tmp_path: Path) -> None:
    problem = tasks.build(run_of(SYSTEMS["marian"], tmp_path))
    batch = problem.collate([problem.test[i] for i in range(4)])

    class Prediction:
        predictions, label_ids = batch["labels"].numpy(), batch["labels"].numpy()

    assert problem.metrics(Prediction())["bleu"] == pytest.approx(100)  # type: ignore[arg-type]


# ---- text


def test_a_learnt_tokeniser_is_kept_and_exact(tmp_path: Path) -> None:
    texts = ["Zwei Männer, „im Freien“ 😀.", *(" ".join(WORDS) for _ in range(20))]
    first = learnt(Tokens(size=400), texts)
    kept = list((tmp_path / "cache" / "tokenizers").iterdir())
    again = learnt(Tokens(size=400), texts)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == kept
    ids = first(texts, add_special_tokens=False)["input_ids"]
    assert again(texts, add_special_tokens=False)["input_ids"] == ids
    back = [text.strip() for text in first.batch_decode(ids)]
    assert back == texts
    learnt(Tokens(size=300), texts)
    # Beside them lie the locks, which some releases of filelock remove.
    assert len(list((tmp_path / "cache" / "tokenizers").glob("[!.]*"))) == 2


def test_a_loaded_tokeniser_is_taken_as_it_is() -> None:
    given = Tokens(load="somewhere")
    assert Tokens.model_validate_json(given.model_dump_json()) == given
    with pytest.raises(ValueError, match="leave the other keys out"):
        Tokens(load="somewhere", size=500)
    with pytest.raises(ConfigError, match=r"options\.tokens\.load is './nothing'"):
        tokenizer(Tokens(load="./nothing"), [])


def test_batches_hold_sequences_of_like_length_and_every_row_once() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 1003)
    sampler = _text.ByLength(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    spread = [np.ptp(lengths[order[i : i + 8]]) for i in range(0, 1000, 8)]
    assert np.mean(spread) < 10  # at random it would be about 78
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_padding_is_masked_and_the_decoder_sees_the_labels_shifted() -> None:
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [5, 1], "labels": [8, 9, 1]}]
    batch = _text.collate(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 1], [0, 8, 9]]
