"""Where a weight lives in its model: whether the model still computes with the flow's parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nmflow.errors import FlowError


class Home:
    """The places of one parameter in its model, as `attach` found them.

    Attributes:
        model: the model.
        names: every name that the parameter had; several where weights are tied.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)
        self._paths = [(name, *_split(name)) for name in names]

    def check(self, param: Tensor) -> None:
        """Raise a `FlowError` unless the parameter is in each of its places.

        A layer that was replaced, a parametrization, an adapter around the layer, `fully_shard`
        and a tied weight that was untied all put something else there.
        """
        for name, path, own in self._paths:
            found = self._find(path, own)
            if found is param:
                continue
            what = "is no longer in the model" if found is None else "is another parameter now"
            raise FlowError(
                f"'{name}' {what}, so the model does not compute with the weight that is trained: "
                "put back the parameter that was there at attach(), or change the model before "
                "attach()"
            )

    def modules(self) -> list[tuple[nn.Module, str]]:
        """The modules that hold the parameter, each with its own name for it."""
        found = []
        for _, path, own in self._paths:
            module = self._walk(path)
            if module is not None:
                found.append((module, own))
        return found

    def _find(self, path: Sequence[str], own: str) -> Tensor | None:
        module = self._walk(path)
        return None if module is None else module._parameters.get(own)

    def _walk(self, path: Sequence[str]) -> nn.Module | None:
        # By the dictionaries: `getattr` on a module costs ten times as much, at every step.
        module: nn.Module | None = self.model
        for part in path:
            module = None if module is None else module._modules.get(part)
        return module


class Homes:
    """The places of many parameters; modules on the way to several of them are checked once."""

    def __init__(self, homes: Sequence[tuple[Home, Tensor]]) -> None:
        self._homes = list(homes)
        self._find()

    def _find(self) -> None:
        inner: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        own: dict[tuple[int, str], tuple[nn.Module, str, Tensor]] = {}
        for home, param in self._homes:
            for _, path, last in home._paths:
                module = home.model
                for part in path:
                    below = module._modules[part]
                    assert below is not None
                    inner[id(module), part] = module, part, below
                    module = below
                own[id(module), last] = module, last, param
        self._inner, self._own = list(inner.values()), list(own.values())

    def check(self) -> None:
        """`Home.check` of each."""
        for module, name, there in self._inner:
            if module._modules.get(name) is not there:
                break
        else:
            for module, name, there in self._own:
                if module._parameters.get(name) is not there:
                    break
            else:
                return
        for home, param in self._homes:
            home.check(param)
        self._find()  # another way to the same parameters


def _split(name: str) -> tuple[tuple[str, ...], str]:
    *path, own = name.split(".")
    return tuple(path), own
