"""The page of the tuning."""

from __future__ import annotations

from choose import at_an_edge, best_rates, means, results
from tables import heading, table, there
from tasks import TASKS


def tuning() -> str:
    """What the tuning chose, and everything that it tried."""
    out = [
        *heading("Tuning"),
        "The figures are the validation loss of the final N:M network at 1:16 on the tuning seed, "
        "100. The setting with the least loss was taken ([protocol](protocol.md)), without reading "
        "the test split. *Edge* marks a recipe whose best rate is the largest or the smallest that "
        "was tried.",
        "",
    ]
    for task in TASKS:
        if not there(f"{task.name}-rates"):
            continue
        frame = results(f"{task.name}-rates")
        found = means(frame, ["recipe", "training.learning_rate"])
        rates = sorted(found["training.learning_rate"].unique())
        best, edges = best_rates(frame), at_an_edge(frame)
        rows = []
        for title in dict.fromkeys(frame["recipe"]):
            one = found[found["recipe"] == title].set_index("training.learning_rate")["mean"]
            cells = [f"{one[r]:.4f}" if r in one else "" for r in rates]
            cells = [
                f"**{c}**" if r == best[title] else c for r, c in zip(rates, cells, strict=True)
            ]
            rows.append([title, *cells, "edge" if title in edges else ""])
        out += [f"## {task.title}", "", "Learning rates:", ""]
        out += [table(["recipe", *(f"{r:g}" for r in rates), ""], rows)]
        if there(f"{task.name}-options"):
            options = means(results(f"{task.name}-options"), ["setup"])
            options["title"] = options["setup"].str.partition(":")[0]
            rows = []
            for title in dict.fromkeys(sorted(options["title"])):
                for place, (setup, loss) in enumerate(
                    options.loc[options["title"] == title, ["setup", "mean"]].to_numpy()
                ):
                    said = setup.partition(": ")[2]
                    rows.append([title if place == 0 else "", said,
                                 f"**{loss:.4f}**" if place == 0 else f"{loss:.4f}"])  # fmt: skip
            out += ["Options at that rate, best first:", ""]
            out += [table(["recipe", "options", "loss"], rows)]
    return "\n".join(out)
