"""The configurations that come with the package, by name: `demo`, `two-cores/vit-cifar10`."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).with_name("configs")
SWEEPS = "sweeps"
# Folders that are only in a checkout, or hold no experiment of `nmflow train`.
_APART = (SWEEPS, "study")
_COMMANDS = {"": "train", SWEEPS: "sweep"}


def names(kind: str = "") -> list[str]:
    """The names of the experiments; with `kind="sweeps"` those of the sweeps.

    >>> names("sweeps")
    ['demo']
    """
    place = FOLDER / kind
    found = (path.relative_to(place) for path in place.rglob("*.yaml"))
    kept = (path for path in found if kind or path.parts[0] not in _APART)
    return sorted((path.with_suffix("").as_posix() for path in kept), key=lambda n: ("/" in n, n))


def find(named: str | Path, kind: str = "") -> Path:
    """The file at the path `named`, or the configuration of that name.

    Anything else is returned unchanged.
    """
    path = Path(named)
    if path.is_file() or path.as_posix() not in names(kind):
        return path
    return FOLDER / kind / f"{path.as_posix()}.yaml"


def instead(named: str | Path, kind: str = "") -> str:
    """Suggest a replacement for `named`, which is neither a file nor a name.

    >>> instead("digit")
    "did you mean 'digits'?"
    """
    known = {form: name for name in names(kind) for form in (name.rpartition("/")[2], name)}
    parts = Path(named).as_posix().removesuffix(".yaml").removesuffix(".yml").split("/")
    for word in ("/".join(parts[-2:]), parts[-1]):
        for close in difflib.get_close_matches(word, known, n=1):
            return f"did you mean '{known[close]}'?"
    return f"give the path of a YAML file, or a name of 'nmflow {_COMMANDS[kind]} --list'"


def listing(kind: str = "") -> list[tuple[str, str]]:
    """Each name with the first sentence of its file."""
    return [(name, _about(FOLDER / kind / f"{name}.yaml")) for name in names(kind)]


def _about(path: Path) -> str:
    said = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        said.append(line.lstrip("# "))
    return " ".join(said).partition(". ")[0].rstrip(".")
