"""The sentences of the study's encoder, and how it is judged beside the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import cosine_similarity

TASKS = ("cola", "sst2", "mrpc", "rte")
TUNING, PAIRS, NEAREST = 1_000, 1_200, 10


def sentences(data: Path) -> tuple[dict[str, list[str]], pd.DataFrame]:
    """Sentences that train, tune and judge, and MRPC's pairs; none is in two of these."""
    read = {
        (task, split): pd.read_parquet(data / task / f"{split}.parquet")
        for task in TASKS
        for split in ("train", "validation")
    }
    mrpc = read["mrpc", "train"].sample(frac=1, random_state=0)
    pairs = pd.concat([read["mrpc", "validation"], mrpc[:PAIRS]], ignore_index=True)
    read["mrpc", "train"] = mrpc[PAIRS:]
    judged = _unique([*(read[t, "validation"] for t in TASKS), pairs])
    left = _unique([read[t, "train"] for t in TASKS])
    left = sorted(left - judged)
    order = np.random.default_rng(0).permutation(len(left))
    tuning, train = order[:TUNING], order[TUNING:]
    main = sorted(_unique([read[t, "validation"] for t in TASKS]))
    parts = {"tuning": [left[i] for i in tuning], "main": main}
    return {**parts, "train": [left[i] for i in train]}, pairs


def _unique(frames: Sequence[pd.DataFrame]) -> set[str]:
    """Every sentence of some tables, once."""
    names = ("sentence", "sentence1", "sentence2")
    return {text.strip() for frame in frames for n in names if n in frame for text in frame[n]}


def alike(made: Tensor, told: Tensor) -> dict[str, float]:
    """How far two embeddings of the same sentences (n, width) agree, in points.

    `correlation` is Spearman's, of the similarities of all pairs; `recall` the share of each
    sentence's ten nearest others by `told` that are among its ten nearest by `made`.
    """
    near, wanted = made @ made.T, told @ told.T
    upper = torch.triu(torch.ones_like(near, dtype=torch.bool), diagonal=1)
    ranks = [x[upper].argsort().argsort().double() for x in (near, wanted)]
    ranks = [x - x.mean() for x in ranks]
    rho = cosine_similarity(*ranks, dim=0)
    found = [x.fill_diagonal_(-2.0).topk(NEAREST).indices for x in (near, wanted)]
    shared = (found[0][:, :, None] == found[1][:, None, :]).any(1).double().mean()
    return {"correlation": 100 * rho.item(), "recall": 100 * shared.item()}


def auc(same: np.ndarray, others: np.ndarray) -> float:
    """The share of (paraphrase, no paraphrase) in which the first is the more similar."""
    return float(stats.mannwhitneyu(same, others).statistic) / (len(same) * len(others))
