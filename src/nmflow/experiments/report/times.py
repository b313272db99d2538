"""Inference times of finished runs' networks: measured on request, and kept beside the runs."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmflow.bench import ways
from nmflow.bench.results import cpu_name, version_text
from nmflow.errors import CompressError, ConfigError, NMFlowError
from nmflow.experiments.config import Model, Run, digest
from nmflow.experiments.files import read_json, write_json
from nmflow.experiments.report.settings import Cell
from nmflow.experiments.run_folder import MODEL
from nmflow.packed import compress, report_of
from nmflow.packed.measure import Timing, time_ways

NAME = "time.json"
DENSE, BEST, PACKED = "dense", "dense, best", "packed"
QUICK_NETWORKS, QUICK_PARAMETERS = 4, 20_000_000  # about three seconds per network


@dataclass(frozen=True)
class Timed:
    """One network's time in a plot: packed, or by the best dense way for a dense network."""

    way: str
    timing: Timing
    entry: Mapping[str, Any]


@dataclass
class Times:
    """The times under one condition, and the networks without one.

    Attributes:
        entries: the times by the key of the network.
        condition: batch, threads and processor of all entries.
        others: the number of networks that were measured under other conditions only.
        problems: a sentence for each network that was not measured.
    """

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    condition: tuple[int, int, str] | None = None
    others: int = 0
    problems: list[str] = field(default_factory=list)

    def of(self, cell: Cell) -> Timed | None:
        """The time of a recipe's network in a setting."""
        entry = self.entries.get(network_key(next(iter(cell.recipe.runs.values()))))
        if entry is None:
            return None
        took = {way: Timing(**t) for way, t in entry["ways"].items()}
        if PACKED in took:
            return Timed(PACKED, took[PACKED], entry)
        way = min(took, key=lambda name: took[name].median)
        return Timed(way, took[way], entry)


def network_key(result: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides the speed of a run's network; not its recipe or seed."""
    run = result["run"]
    named = ["task", "options", "data", "model"]
    if run["recipe"]["name"] != "dense":
        named += ["pattern", "include", "exclude", "remainder"]
    return digest({key: run[key] for key in named})


def read(results: Sequence[Mapping[str, Any]], condition: tuple[int, int] | None = None) -> Times:
    """Read the times beside runs.

    Args:
        results: the runs.
        condition: batch and threads; None takes those with the most networks, or the latest of
            several. Times of different processors are never mixed.
    """
    wanted = {network_key(result) for result in results}
    kept: list[dict[str, Any]] = []
    for result in results:
        place = Path(result.get("folder", "")) / NAME
        if "folder" in result and place.is_file():
            kept += [e for e in read_json(place) if e["key"] == network_key(result)]
    kept.sort(key=lambda entry: entry["date"])
    under = [entry for entry in kept if condition in (None, _condition(entry)[:2])]
    if not under:
        return Times(others=len({e["key"] for e in kept} & wanted))
    many = Counter(c for c, _ in {(_condition(e), e["key"]) for e in under})
    latest = {_condition(entry): entry["date"] for entry in under}
    chosen = max(many, key=lambda c: (many[c], latest[c]))
    entries = {e["key"]: e for e in under if _condition(e) == chosen}
    return Times(entries, chosen, len({e["key"] for e in kept} - set(entries)))


def measure(
    results: Sequence[Mapping[str, Any]],
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda what: None,
) -> list[str]:
    """Measure each distinct network once, and keep its times beside one of its runs.

    Each runs its forward pass on the task's own example in float32 on the CPU: as it is, with the
    best dense kernels and, if it is sparse, compressed. The ways take turns.

    Args:
        results: finished runs, with their folders.
        batch: the number of copies of the example in the batch.
        threads: torch's threads while measuring.
        seconds: the approximate time for each way.
        progress: called with a few words before each network.

    Returns:
        A sentence for each network that could not be measured.

    Raises:
        ConfigError: `batch` or `threads` below 1, or a folder that cannot be written.
    """
    for name, value in (("batch", batch), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: give a number from 1 up")
    networks: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        networks.setdefault(network_key(result), []).append(result)
    problems = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number, (key, runs) in enumerate(networks.items(), 1):
            progress(f"{number} of {len(networks)}: {_name(runs[0])}")
            saved = [r for r in runs if (Path(r["folder"]) / MODEL).is_dir()]
            if not saved:
                problems.append(f"{_name(runs[0])}: no run kept its network (training.save_model)")
                continue
            try:
                entry = _measured(saved[0], batch, seconds)
            except NMFlowError as error:
                problems.append(f"{_name(saved[0])}: {error}")
                continue
            _keep(Path(saved[0]["folder"]) / NAME, {"key": key, "threads": threads, **entry})
    finally:
        torch.set_num_threads(before)
    return problems


def quick(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether measuring takes only seconds: few distinct networks, all small and saved."""
    networks = {network_key(result): result for result in results}
    if len(networks) > QUICK_NETWORKS:
        return False
    for result in networks.values():
        if "folder" not in result or not (Path(result["folder"]) / MODEL).is_dir():
            return False
        if result["cost"]["parameters"] > QUICK_PARAMETERS:
            return False
    return True


def _measured(result: Mapping[str, Any], batch: int, seconds: float) -> dict[str, Any]:
    from nmflow.experiments import tasks
    from nmflow.experiments.training import quiet

    run = Run.model_validate(result["run"])
    saved = Model(kind=run.model.kind, load=str(Path(result["folder"]) / MODEL))
    with quiet():
        problem = tasks.build(run.model_copy(update={"model": saved}))
        model = problem.model().eval()
        example = inputs(model, problem.example, batch)
        held: dict[str, nn.Module] = {DENSE: model, BEST: ways.best_dense(model, example)}
        packed_layers = None
        if run.recipe.name != "dense":
            met = max(ways.tokens_of(model, example).values(), default=1)
            packed = compress(model, tokens=(met,), onednn=True)
            held[PACKED] = packed
            report = report_of(packed)
            packed_layers = f"{len(report.packed)} of {len(report)}"
        one_thread = torch.get_num_threads() == 1
        with torch.inference_mode():
            race = {way: lambda one=one: one(**example) for way, one in held.items()}
            clock = time.thread_time if one_thread else time.perf_counter
            took = time_ways(race, seconds, clock=clock)
    return {
        "run": result["id"],
        "batch": batch,
        "ways": {way: asdict(timing) for way, timing in took.items()},
        "packed_weights": packed_layers,
        "clock": "processor time of the thread" if one_thread else "wall time",
        "generates": bool((problem.arguments or {}).get("predict_with_generate")),
        "cpu": cpu_name(),
        "versions": version_text(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def inputs(model: Any, example: Mapping[str, torch.Tensor], batch: int) -> dict[str, Any]:
    """Copies of the task's example without labels, since inference computes no loss."""
    given = {name: value.repeat_interleave(batch, 0) for name, value in example.items()}
    labels = given.pop("labels", None)
    if model.config.is_encoder_decoder and "decoder_input_ids" not in given:
        if labels is None:
            raise CompressError("the task's example has no labels for the decoder to read")
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return given


def _keep(place: Path, entry: dict[str, Any]) -> None:
    """Replace the entry of the same network and condition."""
    kept = read_json(place) if place.is_file() else []
    same = (entry["key"], _condition(entry))
    kept = [one for one in kept if (one["key"], _condition(one)) != same]
    write_json(place, [*kept, entry])


def _condition(entry: Mapping[str, Any]) -> tuple[int, int, str]:
    return entry["batch"], entry["threads"], entry["cpu"]


def _name(result: Mapping[str, Any]) -> str:
    run = result["run"]
    what = run["model"]["kind"] or run["model"]["load"]
    if run["recipe"]["name"] == "dense":
        return f"{what}, dense (as of {result['id']})"
    include = run["include"] if isinstance(run["include"], str) else ", ".join(run["include"])
    return f"{what}, {result['pattern']} in {include} (as of {result['id']})"
