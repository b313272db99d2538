"""The dense network after int8 dynamic quantization: its figures, and how many bytes it has.

    nmflow sweep configs/study/lm-int8.yaml   # trains the dense networks, and keeps them
    python study/int8.py                      # docs/study/results/lm-int8/int8.parquet

Weights of linear layers become int8 with a scale a tensor, inputs are quantized as they come
(torch's `quantize_dynamic`); embeddings, norms and attention stay float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from choose import RESULTS, ROOT, SWEEPS

from nmflow.bench.ways import int8_dynamic
from nmflow.experiments import sweep, tasks
from nmflow.experiments.config import Model
from nmflow.experiments.run_folder import MODEL, RunFolder
from nmflow.experiments.trainer import trainer
from nmflow.experiments.training import quiet

NAME = "lm-int8"


def figures(cell: Any, store: Path) -> dict[str, float]:
    """Loss and accuracy of a cell's network on the test split, before and after."""
    folder = RunFolder(store / cell.run.id)
    saved = Model(kind=cell.run.model.kind, load=str(folder.path / MODEL))
    with quiet():
        problem = tasks.build(cell.run.model_copy(update={"model": saved}))
        dense = problem.model().eval()
        small = int8_dynamic(dense)
        if small is None:
            raise SystemExit("this torch has no int8 dynamic quantization")
        out: dict[str, float] = {}
        for name, model in (("float32", dense), ("int8", small)):
            found = trainer(cell.run, folder, problem, model, []).evaluate(problem.test)
            out |= {f"{name}_{k}": float(found[f"eval_{k}"]) for k in ("loss", "accuracy")}
    return out


def main() -> None:
    """Quantize and evaluate every cell of the sweep."""
    file = SWEEPS / f"{NAME}.yaml"
    store = ROOT / yaml.safe_load(file.read_text())["cells"]
    rows = [{"seed": c.run.seed, **figures(c, store)} for c in sweep.load(file).cells]
    pd.DataFrame(rows).to_parquet(RESULTS / NAME / "int8.parquet", index=False)


if __name__ == "__main__":
    main()
