"""What a packed module shows of the dense one that it stands for: a weight to read, and a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nmflow.errors import CompressError

_READ_ONLY = (
    "the weight of a packed layer is read-only: call nmflow.decompress(model), change the dense "
    "weight, and compress again"
)


class LazyWeight(Tensor):
    """Stands for a dense weight, which is rebuilt when an op reads it. Nobody can write it.

    Args:
        make: builds the dense weight.
        shape: its shape.
        like: a tensor of its dtype and device.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(  # noqa: D102
        cls, make: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor
    ) -> LazyWeight:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, shape, dtype=like.dtype, device=like.device
        )
        made.make = make
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"<packed weight {tuple(self.shape)}, {self.dtype} on {self.device}>"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.is_write and isinstance(value, LazyWeight):
                raise CompressError(_READ_ONLY)
        args, kwargs = tree_map(
            lambda a: a.make() if isinstance(a, LazyWeight) else a, (args, kwargs)
        )
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info and not returns[0].alias_info.is_write:
            # A view: a write into it would be lost, so it is read-only as well.
            return tree_map(lambda t: _read_only(t) if isinstance(t, Tensor) else t, result)
        return result

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight, still read-only."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise CompressError(_READ_ONLY)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.make().clone()

    def numpy(self, *, force: bool = False) -> Any:
        """A copy of the dense weight as an array."""
        return self.make().numpy(force=force)

    def tolist(self) -> Any:
        """The dense weight as lists."""
        return self.make().tolist()


def _read_only(view: Tensor) -> LazyWeight:
    made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
        LazyWeight,
        view.shape,
        strides=view.stride(),
        storage_offset=view.storage_offset(),
        dtype=view.dtype,
        device=view.device,
    )
    made.make = lambda: view
    return made


class StandsFor(nn.Module):
    """A module that replaces a dense one, and cannot be mistaken for it.

    Its state has an empty tensor under each name in `dense_names`, so that loading it into the
    dense module fails by its shape, also with `strict=False`; and it refuses a dense state, which
    nobody would miss there either.
    """

    dense_names: tuple[str, ...] = ("weight",)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.dense_names:
            raise CompressError(_READ_ONLY)
        super().__setattr__(name, value)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.dense_names:
            destination[prefix + name] = torch.empty(0)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = [prefix + name for name in self.dense_names]
        for name in names:
            if isinstance(held := state_dict.get(name), Tensor) and held.numel():
                error_msgs.append(
                    f"{name} is a dense weight and the layer is packed: load it into the dense "
                    "network, such as nmflow.decompress(model), and compress that"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key not in names]
