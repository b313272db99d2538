"""Text of YAML to plain values, by the rules that people expect of a configuration file."""

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
_NUMBERS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 reads numbers: `1:16` is a pattern, not 76, and `3e-3` a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _NUMBERS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _rule in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _rule, list("-+.0123456789"))


def plain(text: str, where: str) -> Any:
    """The plain value that a text of YAML stands for.

    Args:
        text: the text.
        where: what an error calls it.

    Raises:
        ConfigError: the text is no YAML.

    Example:
        >>> plain("{pattern: 1:16, rate: 3e-3}", "the example")
        {'pattern': '1:16', 'rate': 0.003}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where} is no YAML{line}: mend its syntax") from None
