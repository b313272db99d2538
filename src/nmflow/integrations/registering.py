"""Tell transformers of packed networks when it is imported, and never import it for that.

`import nmflow` leaves a finder that waits for the module of transformers with the list of
quantizers. It steps aside once that module is imported.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LISTS = "transformers.quantizers.auto"


class _Waiting(MetaPathFinder):
    """Finds the one module as everybody else would, and registers once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module that is waited for; None for every other."""
        if fullname != _LISTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = None if spec is None else spec.loader
        if loader is None:
            return spec
        load = loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            register()

        loader.exec_module = load_and_register  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def wait() -> None:
    """Register as soon as transformers has its list of quantizers, or now if it has it."""
    if _LISTS in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def register() -> None:
    """Add the quantizer to the lists of transformers, once."""
    try:
        from nmflow.integrations.quantizer import register as add
    except ImportError as error:  # an older transformers must stay importable
        logging.getLogger(__name__).info("transformers cannot load packed networks: %s", error)
    else:
        add()
