"""Flags that a device raises: read at the next step, without waiting for what came after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flags:
    """Bool scalars on devices, on their way to the host.

    Attributes:
        raised: whether one of those that were read was False, until somebody sees to it.
        kept: while a CUDA graph is captured, the flags that its replays will raise; else None.
    """

    def __init__(self) -> None:
        self.raised = False
        self.kept: list[Tensor] | None = None
        self._given: list[Tensor] = []
        self._sent: list[tuple[Tensor, torch.cuda.Event | None, torch.device]] = []
        self._free: dict[torch.device, list[tuple[Tensor, torch.cuda.Event]]] = {}

    def add(self, flag: Tensor) -> None:
        """Have the next ones that are sent take this one along."""
        self._given.append(flag)

    def send(self, flags: Sequence[Tensor]) -> None:
        """Copy whether all are True to the host, behind the work that the devices have so far.

        A read of a tensor on a device waits for everything that it was given since, such as the
        next forward and backward pass; a copy that was given before them is there by then.
        """
        flags, self._given = [*self._given, *flags], []
        if self.kept is not None:
            self.kept += flags
            return
        for device in dict.fromkeys(flag.device for flag in flags):
            some = [flag for flag in flags if flag.device == device]
            fine = some[0] if len(some) == 1 else torch.stack(some).all()
            event = None
            if device.type == "cuda":
                with torch.cuda.device(device):
                    host, event = self._place(device)
                    fine = host.copy_(fine, non_blocking=True)
                    event.record()
            self._sent.append((fine, event, device))

    def _place(self, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        """Where a flag of a device can go: as a rule where the last but one went."""
        free = self._free.setdefault(device, [])
        if free:
            return free.pop()
        return torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()

    def read(self) -> bool:
        """Whether all that were sent since the last read were True."""
        if self._given and self.kept is None:
            self.send(())
        sent, self._sent = self._sent, []
        fine = True
        for flag, event, device in sent:
            if event is not None:
                event.synchronize()
                self._free[device].append((flag, event))
            fine = bool(flag) and fine
        self.raised = self.raised or not fine
        return fine
