"""What autocast keeps of weights: inside one context it casts each of them only once."""

from __future__ import annotations

import torch


def forget_casts() -> None:
    """Let autocast read weights again, after they were written.

    Otherwise a network in the same context goes on with what the weights were before.
    """
    torch.clear_autocast_cache()
