"""Tiny networks, one for each kind of module whose weights a recipe can target.

A family writes down by hand which parameters are targets and on which axis their groups run, so
that the tests do not take nmflow's own plan for granted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Spec:
    """A target as the reference sees it: the grouped axis, and the output rows or all of them.

    A stacked one has several matrices along axis 0.
    """

    dim: int = 1
    rows: tuple[int, int] | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Family:
    """A network, its input's shape and the targets that `include` and `pattern` must select."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: dict[str, Spec]
    include: Any = "all"
    pattern: str = "1:4"
    attach: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make().to(dtype)
        for parameter in model.parameters():  # some modules start their biases at exactly 0
            if parameter.dim() < 2:
                nn.init.normal_(parameter, std=0.1)
        return model

    def batches(
        self, count: int, dtype: torch.dtype = torch.float64, size: int = 4
    ) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        return [
            torch.randn(size, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
            for _ in range(count)
        ]


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is dense and depends on every output."""
    return ((output - 0.5) ** 2).mean() + 0.1 * output.mean()


class Attention(nn.Module):
    """No biases: a key's bias has a gradient of nothing but rounding, which Adam makes large."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class HFConv1D(nn.Module):
    """GPT-2's projection, stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D  # slow to import, and few tests need it

        self.up = Conv1D(16, 8)
        self.down = Conv1D(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class FusedQKV(nn.Module):
    """timm's attention: queries, keys and values are the rows of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(8, 24, bias=False)
        self.attn.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn.get_submodule("qkv")(x).chunk(3, dim=-1)
        mixed = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return self.attn.get_submodule("proj")(mixed)


class Stack(nn.Module):
    """The matrices of experts in one parameter, (experts, out, in) or (experts, in, out)."""

    def __init__(self, reads: int, writes: int, is_transposed: bool, experts: int) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = experts, is_transposed
        shape = (reads, writes) if is_transposed else (writes, reads)
        self.proj = nn.Parameter(torch.randn(experts, *shape) / math.sqrt(reads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ebi,eio->ebo" if self.is_transposed else "ebi,eoi->ebo", x, self.proj)


class Experts(nn.Module):
    """Every expert on every input, their outputs added."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.up_experts = Stack(8, 16, False, experts)
        self.down_experts = Stack(16, 4, True, experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up_experts(x.expand(self.up_experts.num_experts, *x.shape)))
        return self.down_experts(hidden).sum(0)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def _conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 4, 1))


def _conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise: nothing to group, left out
        nn.Conv2d(8, 8, 3, padding=1, groups=2),  # four input channels of its own: one group
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv3d(8, 4, 1))


def _layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, bias=False, batch_first=True)


BOTH = ["0.*", "2.*"]
"""The last Linear of a network is taken for its head, which only a glob targets."""

FAMILIES = [
    Family("linear", _mlp, (16,), {"0.weight": Spec(), "2.weight": Spec()}, include=BOTH),
    Family("conv1d", _conv1d, (8, 5), {"0.weight": Spec(), "2.weight": Spec()}),
    Family("conv2d-grouped", _conv2d, (8, 4, 4), {"0.weight": Spec(), "3.weight": Spec()}),
    Family("conv3d", _conv3d, (4, 3, 3, 3), {"0.weight": Spec(), "2.weight": Spec()}),
    Family(
        "attention",
        Attention,
        (3, 8),
        {"attention.in_proj_weight": Spec(), "attention.out_proj.weight": Spec()},
    ),
    Family(
        "lstm",
        lambda: Recurrent(nn.LSTM),
        (3, 8),
        {"rnn.weight_ih_l0": Spec(), "rnn.weight_hh_l0": Spec()},
    ),
    Family(
        "gru",
        lambda: Recurrent(nn.GRU),
        (3, 8),
        {"rnn.weight_ih_l0": Spec(), "rnn.weight_hh_l0": Spec()},
        include=["rnn.*"],
    ),
    Family("hf-conv1d", HFConv1D, (3, 8), {"up.weight": Spec(0), "down.weight": Spec(0)}),
    Family(
        "fused-qkv",
        FusedQKV,
        (3, 8),
        {"attn.qkv.weight": Spec(rows=(0, 16))},
        include="qk",
    ),
    Family(
        "encoder-layer",
        _layer,
        (3, 8),
        {
            "self_attn.in_proj_weight": Spec(),
            "self_attn.out_proj.weight": Spec(),
            "linear1.weight": Spec(),
            "linear2.weight": Spec(),
        },
    ),
    Family(
        "experts",
        Experts,
        (8,),
        {
            "up_experts.proj": Spec(2, stacked=True),
            "down_experts.proj": Spec(1, stacked=True),
        },
        pattern="1:4@3",  # 16 and 4 rows: the last panel of each expert is smaller
    ),
    Family(
        "panels",
        _mlp,
        (16,),
        {"0.weight": Spec(), "2.weight": Spec()},
        include=BOTH,
        pattern="1:4@3",  # 32 and 4 rows: the last panel of each weight is smaller
    ),
    Family(
        "3:8",
        _mlp,
        (16,),
        {"0.weight": Spec(), "2.weight": Spec()},
        include=BOTH,
        pattern="3:8",
    ),
]

BY_ID = {family.id: family for family in FAMILIES}
MLP = BY_ID["linear"]
