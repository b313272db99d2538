"""A loan: dense weights in place of a parameter's own during a step of its optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.errors import FlowError
from nmflow.flow.sharding import local, sharded


class Loan:
    """Puts W into one parameter, and takes it out again.

    The two trade memory instead of values: the optimizer writes W where it is, and the forward
    pass finds W̃ at its usual address. A DTensor cannot be swapped, so it is copied.
    """

    def __init__(self, name: str, param: Tensor) -> None:
        self._name, self._param = name, param
        self._resting: Tensor | None = None
        self._copied = self._tried = False
        self._sum: Tensor | None = None

    @property
    def tried(self) -> bool:
        """Whether the optimizer has shown that it steps the parameter's own memory."""
        return self._tried

    def given(self, resting: Tensor) -> None:
        """Note that somebody else put W into the parameter; a tensor has the parameter's memory."""
        self._resting = resting

    def give(self, dense: Tensor) -> None:
        """Put W into the parameter."""
        if sharded(self._param):
            local(self._param).copy_(local(dense))
            self._copied = True
            return
        resting = self._param.data
        self._sum = None if self._tried else _sum(resting)
        self._resting = resting
        self._param.data = dense

    def take_back(self, dense: Tensor, optimizer: str) -> Tensor:
        """Take W out of the parameter: the memory that was lent, or what was bound to it since.

        It may be called twice, or after an interrupted `give`: a Ctrl-C can come at any place.

        Args:
            dense: W, as it was lent.
            optimizer: the name of its kind, for errors.

        Raises:
            FlowError: the optimizer bound weights of another kind or shape to the parameter, or it
                stepped other memory than the parameter's. The parameter is out of its hands then.
        """
        if self._copied:
            local(dense).copy_(local(self._param))
            self._copied = False
        resting, self._resting = self._resting, None
        if resting is None:
            return dense
        found = self._param.data
        self._param.data = resting
        if self._sum is not None:
            # Once is enough, since an optimizer that keeps other memory does so from the start.
            before, self._sum, self._tried = self._sum, None, True
            if not torch.equal(before, _sum(resting)):
                raise FlowError(
                    f"{optimizer} stepped memory of its own for '{self._name}' instead of the "
                    "parameter's own, so it would never see the dense weights: use an optimizer "
                    "that steps the parameters of the model"
                )
        if found.data_ptr() in (dense.data_ptr(), resting.data_ptr()):
            return dense
        kind, own = ((x.shape, x.dtype, x.device) for x in (found, dense))
        if kind != own:
            raise FlowError(
                f"{optimizer} bound {tuple(found.shape)} of {found.dtype} on {found.device} to "
                f"'{self._name}', whose weights are {tuple(dense.shape)} of {dense.dtype} on "
                f"{dense.device}: its step is dropped, so use an optimizer that keeps the shape, "
                "dtype and device of the weights"
            )
        return found


def _sum(x: Tensor) -> Tensor:
    """A number that shows whether `x` was written, as a tensor: nothing waits for a device."""
    return x.sum(dtype=torch.float64 if x.device.type != "mps" else None)
