"""Groups of settings: the keys that differ, and one adjustment for all their comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nmflow.experiments.report.compare import PLACEMENT, Comparison, Recipe, Setting
from nmflow.experiments.report.statistics import LEVEL, holm
from nmflow.pattern import Pattern

NONE = "–"
# Keys of logging and saving, which are named only if no other key differs.
WATCHING = frozenset(
    f"training.{key}"
    for key in ("log_every", "eval_every", "eval_rows", "save_every", "track_every",
                "noise_batches", "save_model")
)  # fmt: skip


class Cell(NamedTuple):
    """One recipe in one setting, over its seeds."""

    setting: Setting
    recipe: Recipe

    @property
    def dense(self) -> bool:
        """Whether it is the dense bound of its family."""
        return self.recipe.name == "dense"

    @property
    def comparison(self) -> Comparison | None:
        """The comparison with the baseline in the headline figure; None for the dense bound."""
        return None if self.dense else self.setting.comparison(self.recipe, self.setting.headline)


@dataclass(frozen=True)
class Group:
    """Settings of one task, one data set and one headline figure.

    Attributes:
        settings: sorted by the keys that differ.
        keys: the dotted keys of a run that differ among them.
        values: the value of each key as text, by the setting's hash.
        usual: the values that all sparse settings share and a dense one does not.
    """

    settings: list[Setting]
    keys: list[str]
    values: Mapping[str, Mapping[str, str]]
    usual: Mapping[str, str]

    @property
    def headline(self) -> str:
        """The headline figure of all."""
        return self.settings[0].headline

    @property
    def title(self) -> str:
        """The task and its data."""
        sample = self.settings[0].sample
        return f"{sample['run']['task']} on {sample['data']['name']}"

    @property
    def recipes(self) -> list[Recipe]:
        """One recipe per title, in the order of the registry."""
        found = {r.title: r for setting in self.settings for r in setting.recipes}
        return sorted(found.values(), key=lambda r: r.place)

    def cells(self) -> Iterator[Cell]:
        """Each recipe of each setting; a family's dense runs count once."""
        seen: set[tuple[str, str]] = set()
        for setting in self.settings:
            for recipe in setting.recipes:
                key = (setting.family, recipe.title)
                if recipe.name == "dense" and key in seen:
                    continue
                seen.add(key)
                yield Cell(setting, recipe)

    def place(self, cell: Cell) -> dict[str, str]:
        """The value of each key; a dense network has no placement of sparsity."""
        values = self.values[cell.setting.hash]
        return {k: NONE if cell.dense and k in PLACEMENT else values[k] for k in self.keys}

    def label(
        self,
        setting: Setting,
        dense: bool = False,
        short: bool = False,
        only: Sequence[str] | None = None,
    ) -> str:
        """The values that identify the setting, such as `1:16 in ff, model.fields.n_inner 32`.

        `short` leaves out the `usual` values and the first parts of keys, `only` other keys.
        """
        said = []
        for key in self.keys:
            value = self.values[setting.hash][key]
            if (dense and key in PLACEMENT) or value == NONE:
                continue
            if only is not None and key not in only:
                continue
            if short and self.usual.get(key) == value:
                continue
            name = key.rpartition(".")[2] if short else key
            plain = {"pattern": value, "include": f"in {value}", "exclude": f"without {value}"}
            said.append(plain.get(key, f"{name} {value}"))
        # A placement belongs to the pattern before it.
        return ", ".join(said).replace(", in ", " in ").replace(", without ", " without ")


def groups(settings: Sequence[Setting]) -> list[Group]:
    """Group the settings by task, data set and headline figure."""
    found: dict[tuple[str, str, str], list[Setting]] = {}
    for setting in settings:
        sample = setting.sample
        key = (sample["run"]["task"], sample["data"]["sha256"], setting.headline)
        found.setdefault(key, []).append(setting)
    return [_group(members) for members in found.values()]


def adjust(settings: Sequence[Setting]) -> list[Comparison]:
    """Adjust the p of all comparisons in the headline figure together (Holm).

    Returns:
        The comparisons with an interval, without those of dense, which is a bound.
    """
    family = [
        c
        for s in settings
        for c in s.comparisons
        if c.metric == s.headline and c.recipe.name != "dense" and c.difference.p is not None
    ]
    for one, p in zip(family, holm([c.difference.p or 0.0 for c in family]), strict=True):
        one.overall = p
    return family


def survives(comparison: Comparison | None) -> bool:
    """Whether a difference is significant after the adjustment for the whole page."""
    return (
        comparison is not None
        and comparison.overall is not None
        and comparison.overall <= 1 - LEVEL
    )


def _group(members: list[Setting]) -> Group:
    flat = {s.hash: _flat(s.sample["run"]) for s in members}
    names = dict.fromkeys(["pattern", "include", "exclude"])
    names |= dict.fromkeys(sorted({key for values in flat.values() for key in values}))
    sparse = [s.hash for s in members if s.sparse]
    keys = []
    for key in names:
        among = sparse if key in PLACEMENT else list(flat)
        if len({repr(flat[h].get(key)) for h in among}) > 1:
            keys.append(key)
    telling = [key for key in keys if key not in WATCHING]
    if len({repr([flat[s.hash].get(k) for k in telling]) for s in members}) == len(members):
        keys = telling

    def order(setting: Setting) -> list[tuple[int, float, str]]:
        return [_order(key, flat[setting.hash].get(key)) for key in reversed(keys)]

    shown: dict[str, dict[str, str]] = {}
    for s in members:
        values = flat[s.hash]
        shown[s.hash] = {
            k: NONE if k in PLACEMENT and not s.sparse else _text(values.get(k)) for k in keys
        }
    shared = {k: {shown[h][k] for h in sparse} for k in keys}
    usual = {k: next(iter(values)) for k, values in shared.items() if len(values) == 1}
    return Group(sorted(members, key=order), keys, shown, usual)


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in run.items():
        if key in ("name", "recipe", "seed"):
            continue
        if isinstance(value, Mapping) and key != "pattern":
            out |= {f"{key}.{inner}": deep for inner, deep in _flat(value).items()}
        else:
            out[key] = value
    if out.get("training.budget") is not None:
        out.pop("training.steps", None)  # solved from the budget
    return out


def _text(value: Any) -> str:
    if value is None or value == []:
        return NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(key: str, value: Any) -> tuple[int, float, str]:
    """A sort key: numbers by size, patterns from dense to sparse, all else by name."""
    if key == "pattern" and value is not None:
        patterns = [Pattern(p) for p in (value.values() if isinstance(value, dict) else [value])]
        return 0, -sum(p.density for p in patterns) / len(patterns), _text(value)
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, _text(value)
