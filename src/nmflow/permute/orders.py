"""Orders of hidden units that let an N:M mask keep more: pure functions of tensors.

An order is a tensor of indices: unit `order[i]` moves to place i. A mask is measured by the sum of
the |w| that it keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.pattern import Pattern


def kept_share(w: Tensor, pattern: Pattern) -> float:
    """The share of Σ|w| that the magnitude mask of a matrix `(out, in)` keeps, groups along `in`.

    Example:
        >>> kept_share(torch.tensor([[3.0, 1.0, 0.0, 0.0]]), Pattern("1:2"))
        0.75
    """
    sizes = _panel_sums(w.detach().abs().double(), pattern.panel)
    kept = sizes.unflatten(-1, (-1, pattern.m)).topk(pattern.n, -1).values.sum()
    return float(kept / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny))


def order_for_groups(
    w: Tensor, pattern: Pattern, *, rounds: int = 40, seed: int = 0, within: int = 0
) -> Tensor:
    r"""An order of the columns of `w`, so that large weights of a row fall into different groups.

    It starts from the present order. Each round pairs the groups of M columns at random, and each
    pair trades the two columns that raise the kept sum the most, if any do. So no round lowers it.

    Args:
        w: `(out, in)`, groups along `in`; not changed.
        pattern: N:M; with a panel, the |w| of its rows are summed first.
        rounds: the number of rounds.
        seed: the seed of the pairs.
        within: trade columns only within runs of this many, a multiple of 2M; 0 has no limit.

    Returns:
        int64, `(in,)`.

    References:
        Channel permutations for N:M sparsity, Pool and Yu, NeurIPS 2021. Differs: all pairs of
        groups in a round at once, and any N and M.
    """
    sizes = _panel_sums(w.detach().abs().float(), pattern.panel).T.contiguous()  # (in, rows)
    order = torch.arange(len(sizes))
    count, m, n = len(sizes) // pattern.m, pattern.m, pattern.n
    draw = torch.Generator().manual_seed(seed)
    if n == m or count < 2:
        return order
    for _ in range(rounds):
        for one, other in _pairs(count, within // m, _at_once(sizes.shape[1], m), draw):
            places = torch.stack([_places(one, m), _places(other, m)])  # (2, pairs, M)
            a, b = sizes[order[places]].movedim(-2, -1)  # (pairs, rows, M) each
            now = _now(a, n) + _now(b, n)
            gains = _after(a, b, n) + _after(b, a, n).mT - now
            # A gain within rounding does not count.
            _trade(order, places, (gains - 1e-6 * now).cpu())
    return order


def order_for_panels(w: Tensor, pattern: Pattern) -> Tensor:
    r"""An order of the rows of `w`, so that rows that keep the same columns share a panel.

    Greedy: a panel begins with the largest row that is left, and takes in one row after another,
    each time the one with the most Σ|w| on the columns that the panel so far would keep.

    Args:
        w: `(out, in)`, groups along `in`. Read only.
        pattern: N:M@V.

    Returns:
        int64, `(out,)`.
    """
    sizes = w.detach().abs().float()
    rows, left = len(sizes), torch.ones(len(sizes), dtype=torch.bool, device=w.device)
    order, norms = [], sizes.sum(1)
    while len(order) < rows:
        first = int(torch.where(left, norms, -1.0).argmax())
        panel = sizes[first].clone()
        order.append(first)
        left[first] = False
        for _ in range(min(pattern.panel, rows - len(order) + 1) - 1):
            grouped = panel.unflatten(-1, (-1, pattern.m))
            kept = torch.zeros_like(grouped).scatter_(-1, grouped.topk(pattern.n, -1).indices, 1.0)
            best = int(torch.where(left, sizes @ kept.flatten(), -1.0).argmax())
            panel += sizes[best]
            order.append(best)
            left[best] = False
    return torch.tensor(order)


def _panel_sums(sizes: Tensor, panel: int) -> Tensor:
    if panel == 1:
        return sizes
    return torch.stack([part.sum(0) for part in sizes.split(panel)])


def _at_once(rows: int, m: int) -> int:
    """Pairs of groups whose trades are computed at once, so that the tensors stay small."""
    return max(1, (1 << 22) // (rows * m * m))


def _pairs(
    count: int, within: int, parts: int, draw: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Random pairs of groups; under `within`, both are of one run."""
    if not within:
        mixed = torch.randperm(count, generator=draw)
        half = count // 2
        one, other = mixed[:half], mixed[half : 2 * half]
        return list(zip(one.split(parts), other.split(parts), strict=True))
    runs = torch.arange(count).split(within)
    mixed = [run[torch.randperm(len(run), generator=draw)] for run in runs if len(run) > 1]
    if not mixed:
        return []
    one = torch.cat([run[: len(run) // 2] for run in mixed])
    other = torch.cat([run[len(run) // 2 : len(run) // 2 * 2] for run in mixed])
    return list(zip(one.split(parts), other.split(parts), strict=True))


def _places(groups: Tensor, m: int) -> Tensor:
    return groups.unsqueeze(1) * m + torch.arange(m)


def _now(a: Tensor, n: int) -> Tensor:
    """The sum that a pair of groups keeps, over all rows: `(pairs, 1, 1)`."""
    return a.topk(n, -1).values.sum((-2, -1)).reshape(-1, 1, 1)


def _after(a: Tensor, b: Tensor, n: int) -> Tensor:
    """The sum that group a keeps once its column i is traded for column j of b: `(pairs, i, j)`."""
    top = a.topk(n + 1, -1).values
    last, next_one = top[..., n - 1 : n], top[..., n:]
    inside = a >= last
    base = top[..., :n].sum(-1, keepdim=True) - torch.where(inside, a - next_one, 0.0)
    # The N-th largest without column i; base counts N columns, so j replaces that one.
    edge = torch.where(inside, next_one, last)
    gained = (b.unsqueeze(-2) - edge.unsqueeze(-1)).clamp_(min=0.0)
    return base.sum(-2).unsqueeze(-1) + gained.sum(-3)


def _trade(order: Tensor, places: Tensor, gains: Tensor) -> None:
    """In each pair, trade the columns with the largest gain, if it is above 0."""
    m = gains.shape[-1]
    gain, best = gains.flatten(1).max(1)
    pairs = torch.arange(len(best))[gain > 0]
    here, there = places[0][pairs, best[pairs] // m], places[1][pairs, best[pairs] % m]
    order[here], order[there] = order[there].clone(), order[here].clone()
