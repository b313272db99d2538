"""Flags that a device raises: read at the next step, without waiting for later work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flags:
    """Bool scalars on devices, on their way to the host.

    Attributes:
        raised: whether a flag that was read was False, until somebody handles it.
        kept: during the capture of a CUDA graph, the flags that its replays will raise; else None.
    """

    def __init__(self) -> None:
        self.raised = False
        self.kept: list[Tensor] | None = None
        self._given: list[Tensor] = []
        self._sent: list[tuple[Tensor, torch.cuda.Event | None, torch.device]] = []
        self._free: dict[torch.device, list[tuple[Tensor, torch.cuda.Event]]] = {}

    def add(self, flag: Tensor) -> None:
        """Send this flag along with the next ones."""
        self._given.append(flag)

    def send(self, flags: Sequence[Tensor]) -> None:
        """Copy to the host whether all are True, after the work that the devices already have.

        Reading a tensor on a device waits for all work queued since, such as the next forward and
        backward pass. A copy that was queued before that work has arrived by then.
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
        """Host memory for a flag of a device: as a rule that of the last flag but one."""
        free = self._free.setdefault(device, [])
        if free:
            return free.pop()
        return torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()

    def read(self) -> bool:
        """Whether all flags sent since the last read were True."""
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
