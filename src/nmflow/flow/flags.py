"""Flags that a device raises: read at the next step, without waiting for what came after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flags:
    """Bool scalars on devices, on their way to the host."""

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def send(self, flags: Sequence[Tensor]) -> None:
        """Copy whether all are True to the host, behind the work that the devices have so far.

        A read of a tensor on a device waits for everything that it was given since, such as the
        next forward and backward pass; a copy that was given before them is there by then.
        """
        for device in dict.fromkeys(flag.device for flag in flags):
            fine = torch.stack([flag for flag in flags if flag.device == device]).all()
            event = None
            if device.type == "cuda":
                with torch.cuda.device(device):
                    host = torch.empty((), dtype=torch.bool, pin_memory=True)
                    fine = host.copy_(fine, non_blocking=True)
                    event = torch.cuda.Event()
                    event.record()
            self._sent.append((fine, event))

    def read(self) -> bool:
        """Whether all that were sent since the last read were True."""
        sent, self._sent = self._sent, []
        for _, event in sent:
            if event is not None:
                event.synchronize()
        return all(bool(fine) for fine, _ in sent)
