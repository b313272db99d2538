"""Files of rows, and instruction tuning: what is learnt, and that packed rows keep apart."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from pyarrow import json as lines
from pyarrow import parquet
from torch.nn.functional import cross_entropy

from nmflow.errors import ConfigError, DataError
from nmflow.experiments import tasks
from nmflow.experiments.config import Data
from nmflow.experiments.data import sources, streams
from nmflow.experiments.data.tokenization import Tokens, learnt
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.tasks import _text
from nmflow.experiments.tasks._conversations import encode
from nmflow.experiments.training import train
from small_systems import SYSTEMS, run_of

pytestmark = pytest.mark.usefixtures("own_cache")

# What a careless reader of CSV changes: nothing, not a number, a break within a cell, a quote.
TEXTS = ["NA", "null", 'a "quoted", cell', "two\nlines", "Grüße", *(f"line {i}" for i in range(25))]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501
MARKED = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501
FORGETFUL = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}!{% endif %}{{ m.content }}</s>{% endfor %}"  # noqa: E501
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one and one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and two?"},
    {"role": "assistant", "content": "four"},
]


def put(folder: Path, source: str, rows: list[dict[str, Any]]) -> Data:
    """A file of the rows; not written by the library that reads it, where that can be."""
    path = folder / f"rows.{source}"
    if source == "csv":
        with path.open("w", newline="", encoding="utf-8") as sink:
            table = csv.DictWriter(sink, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        if source == "parquet":
            parquet.write_table(lines.read_json(path), path)
    return Data(source=source, files={"train": str(path)})  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["csv", "json", "parquet"])
def test_a_column_of_text_is_what_was_written(source: str, tmp_path: Path) -> None:
    data = put(tmp_path, source, [{"number": i, "body": text} for i, text in enumerate(TEXTS)])
    data = data.model_copy(update={"columns": {"text": "body"}})
    found = sources.corpus(data)
    said = "\n".join(found.texts[split] for split in sources.SPLITS)
    assert sorted(said.split("\n")) == sorted("\n".join(TEXTS).split("\n"))
    assert sources.corpus(data).card == found.card
    with pytest.raises(DataError, match=r"data\.columns\.text to one of number, body"):
        sources.corpus(data.model_copy(update={"columns": {}}))
    files = dict.fromkeys(sources.SPLITS, data.files["train"])
    stream = streams.source(data.model_copy(update={"files": files}))
    assert [row["body"] for row in stream.splits["train"]] == TEXTS


def test_a_row_may_be_longer_than_a_block_of_the_reader(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "word " * 300_000} for i in range(3)]
    for source in ("csv", "json"):
        found = sources.rows(put(tmp_path, source, rows).model_copy(
            update={"held_out": {"validation": 1, "test": 1}}
        ))  # fmt: skip
        assert [len(found.splits[s]) for s in sources.SPLITS] == [1, 1, 1]


@pytest.mark.parametrize(
    ("source", "content", "says"),
    [
        ("csv", b"", "not CSV"),
        ("csv", b"a,b\n1\n", "not CSV"),
        ("json", b"", "not JSON"),
        ("json", b'{"a": 1}\nno', "not JSON"),
        ("json", b'[{"a": 1}]', "not JSON"),
        ("parquet", b"a", "not a Parquet file"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(
    source: Any, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        sources.rows(Data(source=source, files={"train": str(tmp_path / "a")}))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="No such file"):
        sources.rows(Data(source=source, files={"train": str(tmp_path / "none")}))


def tokens(template: str | None = None) -> Any:
    # Loaded again and again from the cache: the template is set on a copy.
    import copy

    made = copy.deepcopy(learnt(Tokens(size=300), ["one two four user assistant " * 20]))
    made.chat_template = template
    return made


def learnt_text(made: Any, labels: list[int]) -> list[str]:
    """The runs of labels that count, as text."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == _text.IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [made.decode(run).strip() for run in runs if run]


def test_what_is_learnt_is_the_completion() -> None:
    made = tokens()
    talk = TALK[1:3]
    ids, labels = encode(made, talk, 1, "row 0")
    assert learnt_text(made, labels) == ["two</s>"]
    assert ids[-1] == made.eos_token_id
    prompt = made(talk[0]["content"])["input_ids"]
    assert ids[: len(prompt)] == prompt  # as it is given when the network answers
    assert [i for i, label in zip(ids, labels, strict=True) if label >= 0] == ids[len(prompt) :]
    with pytest.raises(DataError, match="no chat template"):
        encode(made, TALK, 0, "row 0")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_is_learnt_is_what_the_assistant_says(template: str) -> None:
    made = tokens(template)
    ids, labels = encode(made, TALK, 0, "row 0")
    assert learnt_text(made, labels) == ["two</s>", "four</s>"]
    assert made.decode(ids) == made.decode(made.apply_chat_template(TALK)["input_ids"])
    _, labels = encode(made, TALK, 4, "row 0")  # a prompt of four turns
    assert learnt_text(made, labels) == ["four</s>"]


def test_a_template_that_renders_a_turn_otherwise_later_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 7: .* renders turn 2 differently"):
        encode(tokens(FORGETFUL), TALK, 0, "row 7")
    with pytest.raises(DataError, match="does not fit"):
        encode(tokens("{{ raise_exception('roles must alternate') }}"), TALK, 0, "row 7")


NETWORKS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
              "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


def raw(kind: str, data: Data, **options: Any) -> dict[str, Any]:
    fields = NETWORKS.get(kind, SYSTEMS["lstm"]["model"]["fields"])
    return {
        "task": "instruction-tuning",
        "options": {"length": 24, "tokens": {"size": 300}, **options},
        "data": data.model_dump(),
        "model": {"kind": kind, "fields": fields},
        "pattern": "1:4",
        "include": "ff" if kind in NETWORKS else "*lstm.*",
    }


def sums(count: int = 40) -> list[dict[str, str]]:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {"prompt": f"{names[i % 5]} and {names[i % 6]}?", "completion": names[i % 5 + i % 6]}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_packed_batch_is_its_rows_one_by_one(kind: str, tmp_path: Path) -> None:
    problem = tasks.build(run_of(raw(kind, put(tmp_path, "json", sums())), tmp_path))
    torch.manual_seed(0)
    model: Any = problem.model().eval()
    rows = list(range(7))
    batch = problem.train.__getitems__(rows)
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    padded = tasks.build(
        run_of(raw(kind, put(tmp_path, "json", sums()), packing=False), tmp_path)
    ).train.__getitems__(rows)
    assert padded["input_ids"].shape[0] == 7
    want = []
    for i in rows:
        alone = problem.train[i]
        ids, labels = alone["input_ids"][None], alone["labels"]
        logits = model(input_ids=ids).logits[0]
        want.append(cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] >= 0])
    loss = torch.cat(want).mean()
    torch.testing.assert_close(model(**batch).loss, loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**padded).loss, loss, atol=1e-5, rtol=1e-4)
    # What a report says is the loss of the same tokens.
    scored = _text.scored(model(**padded).logits, padded["labels"])

    class Prediction:
        predictions = np.pad(
            scored.detach().numpy(), ((0, 0), (0, 3), (0, 0)), constant_values=-100
        )

    found = _text.figures(Prediction())
    assert found["perplexity"] == pytest.approx(float(loss.detach().exp()), rel=1e-4)


def test_a_network_in_which_packed_rows_would_mix_is_refused(tmp_path: Path) -> None:
    data = put(tmp_path, "csv", sums())
    with pytest.raises(ConfigError, match=r"options\.packing is true: in Lstm"):
        tasks.build(run_of(raw("lstm", data), tmp_path)).model()
    assert tasks.build(run_of(raw("lstm", data, packing=False), tmp_path)).model()


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    long = {"prompt": "one? " * 40, "completion": "no"}
    rows = [*sums(20), long, {"prompt": "so?", "completion": "a " * 60}]
    data = put(tmp_path, "json", rows)
    data = data.model_copy(update={"files": dict.fromkeys(sources.SPLITS, data.files["train"])})
    problem = tasks.build(run_of(raw("gpt2", data), tmp_path))
    assert problem.data.sizes["train"] == len(problem.train) == 21
    said = "\n".join(problem.data.notes)
    assert "2 rows of train are cut to 24 tokens; 1 whose completion" in said
    assert max(len(problem.train[i]["input_ids"]) for i in range(21)) == 24
    with pytest.raises(DataError, match=r"options\.length is 24: no completion of train"):
        tasks.build(run_of(raw("gpt2", put(tmp_path, "json", [long] * 20)), tmp_path))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": " "}, "empty sentence at row 0"),
        ({"prompt": "a"}, r"data\.columns\.completion"),
        ({"messages": "a"}, "no conversation at row 0"),
        ({"messages": []}, "no conversation at row 0"),
        ({"messages": TALK[:2]}, "nothing to learn at row 0"),
        ({"messages": [{"role": "assistant"}]}, "at row 0"),
        ({"messages": TALK}, "no chat template"),
    ],
)
def test_broken_rows_are_one_sentence(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    data = put(tmp_path, "json", [row] * 20)
    with pytest.raises(DataError, match=says) as caught:
        tasks.build(run_of(raw("gpt2", data), tmp_path))
    assert "\n" not in str(caught.value)


def test_instructions_with_a_chat_template_from_file_to_result(tmp_path: Path) -> None:
    tokens(PLAIN).save_pretrained(tmp_path / "tokens")
    rows = [
        {
            "talk": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"]},
            ]
        }
        for r in sums(60)
    ]
    data = put(tmp_path, "json", rows).model_copy(update={"columns": {"messages": "talk"}})
    run = run_of(
        raw("gpt2", data, length=64, tokens={"load": str(tmp_path / "tokens")}), tmp_path,
        training={"steps": 6, "batch_size": 4, "log_every": 2, "eval_every": 2, "eval_rows": 4,
                  "track_every": 2, "noise_batches": 2, "device": "cpu"},
    )  # fmt: skip
    result = train(run, RunFolder(tmp_path / "run"))
    assert result["audit"]["ok"]
    assert result["headline"] == "perplexity"
