"""Load a `transformers` network from a folder without executing any code in it.

Folders with their own code (`auto_map`), with files elsewhere, or with names that are not networks
are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmflow import disk
from nmflow.errors import ConfigError, FileFormatError
from nmflow.inspect.checkpoints import check_shards
from nmflow.text_table import one_line, shown

# For every call that reads untrusted files. Without it, transformers asks on the
# terminal whether to run the code of a folder.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def read_config(folder: Path) -> Any:
    """The `transformers` config of a folder.

    Raises:
        ConfigError: there is none, it is damaged, or it needs code of its own.
    """
    import transformers

    try:
        disk.read_json(folder / "config.json")
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
    except Exception as error:
        raise _refused(folder, f"it holds no model ({_reason(error)})") from error


def from_folder(folder: Path, places: Sequence[Any] = (), fallback: Any = None) -> Any:
    """The network in a folder, with its weights, in evaluation mode.

    Args:
        folder: `config.json` and weights, as `save_pretrained` writes them.
        places: modules in which to look up the architecture, after `transformers`.
        fallback: the class to use if the config names no architecture.

    Raises:
        ConfigError: no model, no known architecture, custom code, damaged weights, or weights that
            do not fill the network.
    """
    import transformers

    config = read_config(folder)
    kind = _architecture(folder, config, (transformers, *places), fallback)
    try:
        check_shards(folder)
        model, told = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **NO_CODE
        )
    except FileFormatError as error:
        raise _refused(folder, str(error)) from error
    except Exception as error:
        raise _refused(folder, f"its network cannot be loaded ({_reason(error)})") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise _refused(
            folder,
            f"it lacks {len(missing)} of the weights of {kind.__name__}, such as "
            f"{shown(str(missing[0]))}",
        )
    return model.eval()


def _architecture(folder: Path, config: Any, places: Sequence[Any], fallback: Any) -> Any:
    import transformers

    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refused(folder, "architectures in its config.json is not a list of names")
    for name in names:
        for place in places:
            kind = getattr(place, name, None) if name.isidentifier() else None
            # transformers also exports modules, functions and stand-ins for missing packages.
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                return kind
    if fallback is not None and not names:
        return fallback
    what = shown(", ".join(names)) or "none"
    raise _refused(folder, f"its config.json names no known architecture ({what})")


def _refused(folder: Path, why: str) -> ConfigError:
    return ConfigError(f"source is {str(folder)!r}: {why}")


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which nmflow does not run"
    return getattr(error, "strerror", None) or one_line(error)
