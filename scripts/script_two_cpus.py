"""As script_site.py, for a script that asks for two accelerators: it gets CPUs.

Each batch is drawn by its step's number, and weights do not depend on what lay in their memory.
"""

import contextlib
import os

import torch

torch.accelerator.is_available = lambda: True
torch.accelerator.device_count = lambda: 2
torch.accelerator.current_accelerator = lambda check_available=False: (
    None if check_available else "cpu"
)
torch.accelerator.device_index = lambda *_: contextlib.nullcontext()

begin = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, device_id: begin("gloo")

drawn = [int(os.environ.get("BATCHES_BEFORE", 0))]
randint = torch.randint


def by_step(*args, **kwargs):
    """Numbers that depend on how many batches came before."""
    if "generator" in kwargs:
        return randint(*args, **kwargs)
    drawn[0] += 1
    return randint(*args, **kwargs, generator=torch.Generator().manual_seed(drawn[0]))


torch.randint = by_step
empty = torch.nn.Module.to_empty


def filled(self, **how):
    """Weights of a seed in memory that holds anything."""
    empty(self, **how)
    for p in self.parameters():
        p.detach().to_local().normal_(std=0.02, generator=torch.Generator().manual_seed(1))


torch.nn.Module.to_empty = filled
