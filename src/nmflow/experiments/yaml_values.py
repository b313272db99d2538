"""Read YAML as plain values, with numbers as people expect them in a configuration."""

from __future__ import annotations

import re
from typing import Any

import yaml

from nmflow.errors import ConfigError

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_MOST_VALUES = 1_000_000
_NUMBERS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}


class _Loader(yaml.SafeLoader):
    """YAML with numbers as in version 1.2: `1:16` is text, not 76, and `3e-3` is a number."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Any:
    keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    twice = next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} occurs twice")
    return yaml.SafeLoader.construct_yaml_map(loader, node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _rule in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _rule, list("-+.0123456789"))


def _exceeds(value: Any, most: int) -> bool:
    """Whether a value has more parts than `most`; an alias counts at each use."""
    waiting = [value]
    while waiting and most > 0:
        most -= 1
        part = waiting.pop()
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple | set):
            waiting.extend(part)
    return bool(waiting)


def plain(text: str, where: str) -> Any:
    """The plain value of a YAML text.

    Args:
        text: the text.
        where: its name in errors.

    Raises:
        ConfigError: the text is not YAML.

    Example:
        >>> plain("{pattern: 1:16, rate: 3e-3}", "the example")
        {'pattern': '1:16', 'rate': 0.003}
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        if _exceeds(value, _MOST_VALUES):
            raise ConfigError(f"{where} stands for too many values: write them without aliases")
        return value
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:80]
        raise ConfigError(f"{where} cannot be read ({what}): correct its values") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where} is not YAML{line}: correct its syntax") from None
