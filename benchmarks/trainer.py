"""What `nmflow train` costs beside a bare loop of the same steps, on the embedded task.

Each round runs, one after the other in one process: a bare loop (batch, forward, backward, clip,
AdamW, schedule, the recipe), the Trainer alone, `nmflow train` as the demo is configured but for
its measurements of gradient noise, and with them; all but the first with the final evaluation, the
audit and the files of a run. Medians over rounds, with the quartiles, of processor and of wall
time; on a busy machine trust the first.

    python benchmarks/trainer.py [--steps 400] [--rounds 5] [--recipe mdgf-exponential]
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import nmflow
from nmflow.experiments import config, tasks
from nmflow.experiments.config import Run
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import train

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
QUIET = [
    "training.eval_every=1000000",
    "training.save_every=1000000",
    "training.track_every=0",
    "training.noise_batches=0",
]


def bare(run: Run) -> None:
    """The loop that one would write by hand."""
    problem, t = tasks.build(run), run.training
    transformers.set_seed(run.seed)
    model = problem.model().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=t.learning_rate, weight_decay=t.weight_decay, fused=True
    )
    warmup = round(t.warmup * t.steps)
    schedule = transformers.get_scheduler(t.schedule, optimizer, warmup, t.steps)
    flow = nmflow.attach(
        model, optimizer, run.recipe.build(), run.pattern, run.include, total_steps=t.steps
    )
    order = torch.randperm(len(problem.train))
    for step in range(t.steps):
        batch = problem.train.__getitems__(order[step * t.batch_size :][: t.batch_size].tolist())
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    flow.finalize()


def through_trainer(run: Run) -> None:
    """What `nmflow train` does for a run."""
    with tempfile.TemporaryDirectory() as folder:
        train(run, RunFolder(Path(folder) / "run"))


def the_run(steps: int, recipe: str, more: list[str]) -> Run:
    """The demo's first seed of a recipe."""
    overrides = [f"training.steps={steps}", f"recipes=[{{name: {recipe}, dense: 0.05}}]", *more]
    return next(config.load(CONFIG, overrides).runs())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of processor and of wall time."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def main() -> None:
    """Print a CSV of every way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="mdgf-exponential")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-noise", action="store_true", help="leave the last way out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain = the_run(given.steps, given.recipe, QUIET)
    whole = the_run(given.steps, given.recipe, ["training.noise_batches=0"])
    noise = the_run(given.steps, given.recipe, [])
    ways: dict[str, Callable[[], object]] = {
        "bare loop": lambda: bare(plain),
        "Trainer alone": lambda: through_trainer(plain),
        "nmflow train": lambda: through_trainer(whole),
        "nmflow train, with gradient noise": lambda: through_trainer(noise),
    }
    if given.no_noise:
        ways.popitem()
    bare(the_run(10, given.recipe, QUIET))  # warms caches up
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, ", end="")
    print(f"{given.threads} thread(s), {given.steps} steps, {given.rounds} rounds, {given.recipe}")
    print("way,clock,q1_ms_per_step,median_ms_per_step,q3_ms_per_step,ratio_to_bare")
    for (at, clock), name in itertools.product(enumerate(("processor", "wall")), ways):
        ms = [1000 * pair[at] / given.steps for pair in seconds[name]]
        base = [1000 * pair[at] / given.steps for pair in seconds["bare loop"]]
        ratio = statistics.median(a / b for a, b in zip(ms, base, strict=True))
        q1, median, q3 = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
        print(f"{name},{clock},{q1:.2f},{median:.2f},{q3:.2f},{ratio:.3f}")


if __name__ == "__main__":
    main()
