"""Metrics of a running flow and gradient noise, against numpy written without the library."""

from __future__ import annotations

import csv
import doctest
import math

import numpy as np
import pytest
import torch
from torch import nn

import nmflow.inspect.noise
import nmflow.inspect.track
from nmflow.errors import DataError, FlowError, PlanError
from nmflow.flow import attach
from nmflow.inspect.noise import gradient_noise
from nmflow.inspect.track import track
from nmflow.recipes import MDGF, SRSTE
from nmflow.select.plan import plan


def mask_by_hand(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """The n largest of every m, ties to the lowest index: a stable sort of each group."""
    kept = np.zeros(w.shape, bool)
    for i, row in enumerate(w):
        for start in range(0, len(row), m):
            order = np.argsort(-np.abs(row[start : start + m]), kind="stable")
            kept[i, start + order[:n]] = True
    return kept


def run(recipe, steps=6, **options):
    """Train a small network; gives the tracker and, by numpy, what each step looked like."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    flow = attach(model, optimizer, recipe, {"0": "1:4", "2": "2:8"}, total_steps=steps)
    tracker = track(flow, **options)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 16)).square().mean().backward()
        dense = flow.dense_weights()
        seen.append({
            target.label: (
                dense[target.name].detach().double().numpy().copy(),
                model.get_parameter(target.name).detach().double().numpy().copy(),
                np.asarray(model.get_parameter(target.name).grad, dtype=np.float64),
                target.pattern.n,
                target.pattern.m,
            )
            for target in flow.plan
        })  # fmt: skip
        optimizer.step()
    return tracker, seen


def expect(row, pieces, before):
    """Compare a row with the pieces (W, W̃, g, mask) of its targets."""
    g = np.concatenate([p[2].ravel() for p in pieces])
    kept = np.concatenate([p[3].ravel() for p in pieces])
    w = np.concatenate([p[0].ravel() for p in pieces])
    shown = np.concatenate([p[1].ravel() for p in pieces])
    for suffix, part in (("", g), ("_kept", g[kept]), ("_pruned", g[~kept])):
        assert row[f"grad_mean{suffix}"] == pytest.approx(part.mean(), rel=1e-6, abs=1e-12)
        assert row[f"grad_var{suffix}"] == pytest.approx(part.var(), rel=1e-6)
        assert row[f"grad_second{suffix}"] == pytest.approx((part**2).mean(), rel=1e-6)
        assert row[f"grad_norm{suffix}"] == pytest.approx(np.linalg.norm(part), rel=1e-6)
    assert row["weights"] == w.size
    assert row["kept"] == kept.sum()
    norm = np.linalg.norm(w)
    assert row["distance"] == pytest.approx(np.linalg.norm(w - shown) / norm, rel=1e-5, abs=1e-9)
    assert row["distance_hard"] == pytest.approx(np.linalg.norm(w * ~kept) / norm, rel=1e-6)
    if before is None:
        assert row["sad"] is None
        assert row["flip_rate"] is None
    else:
        changed = int((before != kept).sum())
        assert row["sad"] == changed
        assert row["flip_rate"] == changed / kept.size
    return kept


@pytest.mark.parametrize(
    "recipe", ["dense", "ste", SRSTE(dense=0.34), "mdgf-linear", MDGF(finetune=0.34), "one-shot"],
    ids=str,
)  # fmt: skip
def test_rows_agree_with_numpy(recipe):
    tracker, seen = run(recipe)
    assert len(tracker.rows) == 3 * len(seen)
    before = {}
    if recipe == "one-shot":  # its mask is taken once, so it is not the largest of each step
        seen = seen[:3]
    for k, targets in enumerate(seen):
        rows = {r["target"]: r for r in tracker.rows if r["step"] == k}
        assert set(rows) == {"0.weight", "2.weight", "all"}
        pieces = {
            label: (w, shown, g, mask_by_hand(w, n, m))
            for label, (w, shown, g, n, m) in targets.items()
        }
        for label, row in rows.items():
            own = list(pieces.values()) if label == "all" else [pieces[label]]
            before[label] = expect(row, own, before.get(label))
    assert any(row["sad"] for row in tracker.rows if row["sad"] is not None)


def test_a_dense_run_has_a_mask_and_no_distance_of_its_own():
    tracker, _ = run("dense")
    for row in tracker.rows:
        assert row["phase"] == "dense"
        assert row["pattern"] == "dense"
        assert row["distance"] == 0
        assert row["distance_hard"] > 0
        assert 0 < row["kept"] < row["weights"]


def test_phase_pattern_and_delta_follow_the_recipe():
    tracker, _ = run(MDGF("linear", dense=2, finetune=2), steps=8, per_target=False)
    assert [r["phase"] for r in tracker.rows] == ["dense"] * 2 + ["decay"] * 4 + ["finetune"] * 2
    assert [r["delta"] for r in tracker.rows] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert tracker.rows[-1]["pattern"] == "1:4 2:8"
    assert tracker.rows[-1]["distance"] == pytest.approx(tracker.rows[-1]["distance_hard"])
    assert tracker.rows[3]["distance"] == pytest.approx(0.25 * tracker.rows[3]["distance_hard"])


def test_every_stop_and_a_weight_without_a_gradient():
    tracker, _ = run("ste", every=3, per_target=False)
    assert [row["step"] for row in tracker.rows] == [0, 3]
    used = nn.Linear(8, 8)
    model = nn.ModuleDict({"used": used, "idle": nn.Linear(8, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flow = attach(model, optimizer, "ste", "1:4", "*", total_steps=9)
    tracker = track(flow)
    for k in range(3):
        if k == 2:
            tracker.stop()
        used(torch.randn(2, 8)).sum().backward()
        optimizer.step()
    rows = {r["target"]: r for r in tracker.rows if r["step"] == 1}
    assert len(tracker.rows) == 6
    assert rows["idle.weight"]["grad_mean"] is None
    assert rows["idle.weight"]["grad_norm"] is None
    assert rows["all"]["grad_norm"] == rows["used.weight"]["grad_norm"]
    assert rows["all"]["weights"] == 128
    tracker.stop()


def test_several_optimizers_make_one_aggregate_a_step():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    flow = attach(model, optimizers, "sr-ste", "1:4", "*", total_steps=4)
    tracker = track(flow, per_target=False)
    for _ in range(4):
        model(torch.randn(4, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert [(r["step"], r["weights"]) for r in tracker.rows] == [(k, 128) for k in range(4)]


def test_tracking_changes_nothing():
    finals = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(16, 8)
        optimizer = torch.optim.AdamW(model.parameters())
        flow = attach(model, optimizer, "mdgf-exponential", "1:4", "*", total_steps=5)
        if watched:
            track(flow)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().mean().backward()
            optimizer.step()
        flow.finalize()
        finals.append(model.weight.detach().clone())
    assert torch.equal(*finals)


def test_csv(tmp_path):
    tracker, _ = run("ste", steps=2)
    tracker.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(tracker.rows) == 6
    assert read[0]["sad"] == ""
    assert [float(r["grad_var"]) for r in read] == [r["grad_var"] for r in tracker.rows]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_checked(every):
    model = nn.Linear(8, 8)
    flow = attach(model, torch.optim.SGD(model.parameters(), lr=1.0), "ste", "1:4", total_steps=3)
    with pytest.raises(FlowError, match="every is"):
        track(flow, every=every)


def square_loss(model, batch):
    return model(batch).square().mean()


def noise_by_hand(model, batches, names):
    grads = {name: [] for name in names}
    for batch in batches:
        model.zero_grad()
        square_loss(model, batch).backward()
        for name in names:
            grads[name].append(model.get_parameter(name).grad.double().numpy().copy())
    model.zero_grad()
    return {name: np.stack(g) for name, g in grads.items()}


def test_noise_agrees_with_numpy_on_every_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    batches = torch.randn(40, 6, 16)
    targets = plan(model, {"0": "1:4", "2": "2:8"})
    grads = noise_by_hand(model, batches, [t.name for t in targets])
    found = gradient_noise(model, square_loss, batches, targets)
    assert all(p.grad is None for p in model.parameters())
    total = {part: [0.0, 0.0, 0.0] for part in ("all", "kept", "pruned")}
    for t in targets:
        g = grads[t.name]
        w = model.get_parameter(t.name).detach().numpy()
        kept = mask_by_hand(w, t.pattern.n, t.pattern.m)
        for part, where in (("all", kept | True), ("kept", kept), ("pruned", ~kept)):
            row = found.of(part, t.label)
            signal = (g.mean(0)[where] ** 2).sum()
            noise = g.var(0, ddof=1)[where].sum()
            second = (g**2).mean(0)[where].sum()
            assert row.weights == where.sum()
            assert row.batches == 40
            assert row.signal == pytest.approx(signal, rel=1e-5)
            assert row.noise == pytest.approx(noise, rel=1e-5)
            assert row.second == pytest.approx(second, rel=1e-5)
            assert row.snr == pytest.approx(signal / noise, rel=1e-5)
            assert row.snr_unbiased == pytest.approx(signal / noise - 1 / 40, rel=1e-4)
            total[part] = [a + b for a, b in zip(total[part], (signal, noise, second), strict=True)]
    for part, sums in total.items():
        row = found.of(part)
        assert (row.signal, row.noise, row.second) == pytest.approx(tuple(sums), rel=1e-5)


def test_pure_noise_has_a_ratio_of_one_over_the_batches():
    torch.manual_seed(0)
    model = nn.Linear(32, 32, bias=False)
    targets = plan(model, "1:4")
    batches = torch.randn(100, 32, 32)  # the gradient of each is the batch itself: mean 0

    def loss(m, noise):
        return (m.weight * noise).sum()

    found = gradient_noise(model, loss, batches, targets).of()
    assert found.snr == pytest.approx(1 / 100, rel=0.1)
    assert abs(found.snr_unbiased) < 1e-3
    shifted = gradient_noise(model, loss, batches + 2.0, targets).of()
    assert shifted.snr_unbiased == pytest.approx(4.0, rel=0.05)


def test_dense_weights_tell_kept_from_pruned_while_a_recipe_runs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    flow = attach(model, optimizer, "ste", "1:4", total_steps=5)
    batches = torch.randn(8, 4, 16)
    # Under a binary mask the network's own weights tell the same; and nothing is disturbed.
    dense = gradient_noise(model, square_loss, batches, flow.plan, weights=flow.dense_weights())
    own = gradient_noise(model, square_loss, batches, flow.plan)
    assert dense == own
    assert dense.of("kept").weights == 32
    square_loss(model, batches[0]).backward()
    optimizer.step()
    assert flow.steps_done == 1


def test_rows_of_fused_weights_and_unused_ones():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    targets = plan(model, {"qk": "1:4"})
    found = gradient_noise(
        model, lambda m, x: m(x, x, x)[0].square().mean(), torch.randn(5, 2, 6, 8), targets
    )
    assert found.of("all", "in_proj_weight[0:16]").weights == 16 * 8
    idle = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    found = gradient_noise(
        idle,
        lambda m, x: m.get_submodule("used")(x).sum(),
        torch.randn(3, 2, 8),
        plan(idle, "1:4", "*"),
    )
    row = found.of("all", "idle.weight")
    assert (row.signal, row.noise) == (0, 0)
    assert math.isnan(row.snr)
    assert "idle.weight" in str(found)
    assert found.to_dict()["rows"][0]["snr"] == found.of().snr


def test_bad_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    targets = plan(model, "1:4")
    batches = torch.randn(3, 2, 8)
    with pytest.raises(DataError, match="at least two"):
        gradient_noise(model, square_loss, batches[:1], targets)
    with pytest.raises(DataError, match="for batch 0"):
        gradient_noise(model, lambda m, x: m(x), batches, targets)
    with pytest.raises(DataError, match="for batch 0"):
        gradient_noise(model, lambda m, x: m(x).sum() * float("nan"), batches, targets)
    with pytest.raises(PlanError, match="targets is empty"):
        gradient_noise(model, square_loss, batches, [])
    with pytest.raises(PlanError, match=r"0\.weight is not a parameter"):
        gradient_noise(nn.Linear(8, 8), square_loss, batches, targets)
    for weights in ({}, {"1.weight": torch.ones(2, 8)}):
        with pytest.raises(PlanError, match=r"weights has no 0\.weight: give"):
            gradient_noise(model, square_loss, batches, targets, weights=weights)
    model.requires_grad_(False)
    with pytest.raises(PlanError, match="requires_grad"):
        gradient_noise(model, square_loss, batches, targets)


@pytest.mark.parametrize("module", [nmflow.inspect.track, nmflow.inspect.noise])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
