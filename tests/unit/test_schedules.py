"""Schedules against tables that were written by hand from the definition of each recipe."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmflow
from nmflow.errors import NMFlowWarning, RecipeError
from nmflow.pattern import Pattern
from nmflow.recipes import resolve

E = math.exp


def walk(recipe: Any, total: int, pattern: str, length: int = 4096) -> list[Any]:
    """The stages of a run, the final one included."""
    return [recipe.stage(k, total, Pattern(pattern), length) for k in range(total + 1)]


def frames(recipe: Any, total: int, pattern: str, length: int = 4096) -> list[str]:
    return [str(stage.pattern) for stage in walk(recipe, total, pattern, length)]


def test_dense_is_dense() -> None:
    assert all(stage.pattern is None for stage in walk(nmflow.Dense(), 5, "1:4"))


@pytest.mark.parametrize("recipe", [nmflow.STE(dense=2), nmflow.SRSTE(dense=2)], ids=["ste", "sr"])
def test_ste(recipe: Any) -> None:
    stages = walk(recipe, 5, "1:16")
    assert [s.phase for s in stages] == ["dense", "dense", "sparse", "sparse", "sparse", "final"]
    assert [s.pattern and str(s.pattern) for s in stages] == [None, None, *["1:16"] * 4]
    assert [s.delta for s in stages[2:]] == [0.0] * 4
    assert [s.previous for s in stages] == [None] * 6


def test_ste_is_sparse_from_the_first_forward() -> None:
    assert [s.phase for s in walk(nmflow.STE(), 2, "1:4")] == ["sparse", "sparse", "final"]


def test_one_shot() -> None:
    stages = walk(nmflow.OneShot(), 6, "2:4")
    assert [s.phase for s in stages] == ["dense"] * 3 + ["sparse"] * 3 + ["final"]
    assert [s.delta for s in stages[3:]] == [0.0] * 4


def test_mdgf_linear() -> None:
    recipe = nmflow.MDGF(decay="linear", dense=2, finetune=3)
    stages = walk(recipe, 10, "1:4")
    phases = ["dense"] * 2 + ["decay"] * 5 + ["finetune"] * 3 + ["final"]
    assert [s.phase for s in stages] == phases
    assert [s.pattern and str(s.pattern) for s in stages] == [None] * 2 + ["1:4"] * 9
    assert [s.previous for s in stages] == [None] * 11
    deltas = [s.delta for s in stages[2:]]
    assert deltas == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])
    assert deltas[0] == 1.0
    assert deltas[5:] == [0.0] * 4  # exactly 0 from K - f on


def test_mdgf_exponential() -> None:
    recipe = nmflow.MDGF(decay="exponential", dense=1, finetune=1)
    deltas = [s.delta for s in walk(recipe, 7, "1:4")[1:]]
    assert deltas[:5] == pytest.approx([1.0, E(-1), E(-2), E(-3), E(-4)], rel=1e-12)
    assert deltas[5:] == [0.0, 0.0]


def test_mdgf_exponential_without_a_fine_tune_phase_still_ends_binary() -> None:
    stages = walk(nmflow.MDGF(decay="exponential", dense=0.0, finetune=0.0), 5, "1:4")
    assert stages[4].delta == pytest.approx(E(-4))
    assert (stages[5].phase, stages[5].delta, str(stages[5].pattern)) == ("final", 0.0, "1:4")


def test_given_beta_is_per_step_and_counts_from_the_end_of_the_dense_phase() -> None:
    linear = nmflow.MDGF(decay="linear", beta=0.25, dense=3, finetune=1)
    deltas = [s.delta for s in walk(linear, 10, "1:4")[3:]]
    assert deltas == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0])
    exponential = nmflow.MDGF(decay="exponential", beta=1.5, dense=3, finetune=1)
    deltas = [s.delta for s in walk(exponential, 6, "1:4")[3:]]
    assert deltas == pytest.approx([1.0, E(-1.5), 0.0, 0.0])


def test_a_beta_that_ends_high_warns_with_both_figures() -> None:
    """2e-4 a step over 480 steps leaves delta at 0.908 when the mask turns binary."""
    slow = nmflow.MDGF(decay="exponential", beta=2e-4, dense=0.0, finetune=0.2)
    with pytest.warns(NMFlowWarning) as caught:
        slow.check(600)
    said = str(caught[0].message)
    assert "0.0002" in said or "2e-04" in said or "2e-4" in said
    assert "0.9" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nmflow.MDGF(decay="exponential").check(600)
        nmflow.MDGF(decay="exponential", beta=2.4 / 480).check(600)  # ends at 0.0907


@pytest.mark.parametrize(
    ("pattern", "ladder"),
    [
        ("3:8", ["7:8", "4:8", "3:8"]),
        ("1:16", ["15:16", "8:16", "4:16", "2:16", "1:16"]),
        ("1:4", ["3:4", "2:4", "1:4"]),
        ("2:4", ["3:4", "2:4"]),
        ("1:2", ["1:2"]),
        ("3:4", ["3:4"]),
        ("1:3", ["2:3", "1:3"]),
        ("1:7", ["6:7", "4:7", "2:7", "1:7"]),
        ("5:8", ["7:8", "5:8"]),
        ("2:32", ["31:32", "16:32", "8:32", "4:32", "2:32"]),
        ("1:32", ["31:32", "16:32", "8:32", "4:32", "2:32", "1:32"]),
        ("3:32", ["31:32", "16:32", "8:32", "4:32", "3:32"]),
        ("4:4", ["4:4"]),
        ("1:1", ["1:1"]),
        ("1:4@8", ["3:4@8", "2:4@8", "1:4@8"]),
    ],
)
def test_stepwise(pattern: str, ladder: list[str]) -> None:
    each = 3
    total = each * len(ladder) + 2
    recipe = nmflow.SDGF(structure="stepwise", dense=0, finetune=2)
    expected = [frame for frame in ladder for _ in range(each)] + [pattern] * 3
    assert frames(recipe, total, pattern) == expected
    assert all(s.delta == 0.0 and s.previous is None for s in walk(recipe, total, pattern))


@pytest.mark.parametrize(
    ("pattern", "length", "ladder"),
    [
        ("1:16", 768, ["8:128", "4:64", "2:32", "1:16"]),
        ("2:4", 64, ["16:32", "8:16", "4:8", "2:4"]),
        ("1:16", 64, ["4:64", "4:64", "2:32", "1:16"]),
        ("1:16", 96, ["2:32", "2:32", "2:32", "1:16"]),
        ("1:16", 48, ["1:16", "1:16", "1:16", "1:16"]),
        ("1:128", 3072, ["8:1024", "4:512", "2:256", "1:128"]),
        ("3:8", 3 * 16, ["6:16", "6:16", "6:16", "3:8"]),
        ("1:4@16", 32, ["8:32@16", "4:16@16", "2:8@16", "1:4@16"]),
    ],
)
def test_geometric(pattern: str, length: int, ladder: list[str]) -> None:
    recipe = nmflow.SDGF(structure="geometric", dense=1, finetune=2)
    expected = ["None"] + [frame for frame in ladder for _ in range(2)] + [pattern] * 3
    assert frames(recipe, 11, pattern, length) == expected
    assert all(s.delta == 0.0 for s in walk(recipe, 11, pattern, length)[1:])


@pytest.mark.parametrize(
    ("pattern", "ladder"),
    [
        ("1:8@16", ["1:8", "1:8@2", "1:8@4", "1:8@8", "1:8@16"]),
        ("2:4@3", ["2:4", "2:4@3"]),
        ("1:4@48", ["1:4", "1:4@3", "1:4@6", "1:4@12", "1:4@24", "1:4@48"]),
        ("1:4", ["1:4"]),
    ],
)
def test_panels_grow_by_whole_ones(pattern: str, ladder: list[str]) -> None:
    recipe = nmflow.SDGF(structure="panels", dense=0, finetune=2)
    expected = [frame for frame in ladder for _ in range(3)] + [pattern] * 3
    assert frames(recipe, 3 * len(ladder) + 2, pattern) == expected
    widths = [Pattern(frame).panel for frame in ladder]
    assert all(wide % narrow == 0 for narrow, wide in itertools.pairwise(widths))
    assert bool(recipe.note(Pattern(pattern), 64)) == ("@" not in pattern)


def test_frames_differ_by_one_step_where_they_do_not_divide() -> None:
    for span in range(5, 40):
        recipe = nmflow.SDGF(structure="stepwise", dense=0, finetune=1)
        said = frames(recipe, span + 1, "1:16")[:span]
        ladder = ["15:16", "8:16", "4:16", "2:16", "1:16"]
        lengths = [said.count(frame) for frame in ladder]
        assert sum(lengths) == span
        assert max(lengths) - min(lengths) <= 1
        assert said == [frame for frame, n in zip(ladder, lengths, strict=True) for _ in range(n)]


def test_hybrid() -> None:
    """Within each frame only what the new pattern drops fades, from 1 to the frame's end."""
    recipe = nmflow.Hybrid(structure="stepwise", decay="linear", dense=1, finetune=2)
    stages = walk(recipe, 15, "1:4")
    assert stages[0].phase == "dense"
    assert [str(s.pattern) for s in stages[1:]] == ["3:4"] * 4 + ["2:4"] * 4 + ["1:4"] * 7
    said = [s.previous and str(s.previous) for s in stages[1:13]]
    assert said == [None] * 4 + ["3:4"] * 4 + ["2:4"] * 4
    assert [s.delta for s in stages[1:]] == pytest.approx([1, 0.75, 0.5, 0.25] * 3 + [0.0] * 3)
    assert [s.phase for s in stages[13:]] == ["finetune", "finetune", "final"]

    fast = nmflow.Hybrid(structure="geometric", decay="exponential", dense=0, finetune=1)
    stages = walk(fast, 21, "1:16", 768)
    ladder = ["8:128", "4:64", "2:32", "1:16"]
    assert [str(s.pattern) for s in stages[:20]] == [frame for frame in ladder for _ in range(5)]
    assert [s.delta for s in stages[:20]] == pytest.approx([E(-j) for j in range(5)] * 4)
    assert [s.delta for s in stages[20:]] == [0.0, 0.0]

    own = nmflow.Hybrid(structure="stepwise", decay="linear", beta=0.5, dense=1, finetune=2)
    assert [s.delta for s in walk(own, 15, "1:4")[1:13]] == pytest.approx([1, 0.5, 0, 0] * 3)


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [  # ⌈N + (M - N)·(1 - t/8)³⌉ by hand, at most M - 1
        ("1:16", [15, 12, 8, 5, 3, 2, 2, 2]),
        ("1:4", [3, 3, 3, 2, 2, 2, 2, 2]),
        ("2:4", [3] * 8),
        ("3:8", [7, 7, 6, 5, 4, 4, 4, 4]),
        ("1:128", [127, 87, 55, 33, 17, 8, 3, 2]),
        ("1:2", [1] * 8),
        ("7:8", [7] * 8),
        ("4:4", [4] * 8),
        ("1:1", [1] * 8),
    ],
)
@pytest.mark.parametrize("panel", ["", "@8"])
def test_gradual(pattern: str, kept: list[int], panel: str) -> None:
    pattern, m = pattern + panel, pattern.partition(":")[2] + panel
    recipe = nmflow.Gradual(dense=1, finetune=2)
    stages = walk(recipe, 11, pattern)
    assert [s.phase for s in stages] == ["dense"] + ["decay"] * 8 + ["finetune"] * 2 + ["final"]
    assert [str(s.pattern) for s in stages[1:]] == [f"{n}:{m}" for n in kept] + [pattern] * 3
    assert all(s.delta == 0.0 and s.previous is None for s in stages[1:])
    assert str(recipe.patterns(Pattern(pattern), 4096)[-1]) == pattern


@given(st.integers(1, 200), st.data(), st.integers(1, 10**7), st.sampled_from([1, 8]))
def test_the_cubic_law(m: int, data: Any, span: int, panel: int) -> None:
    """The least n that the law's density does not exceed; N at the end and above it before."""
    n, t = data.draw(st.integers(1, m)), data.draw(st.integers(0, span - 1))
    final, recipe = Pattern.of(n, m, panel), nmflow.Gradual(finetune=0)
    found = recipe.stage(t, span, final, m).pattern
    density = Fraction(n, m) + (1 - Fraction(n, m)) * (1 - Fraction(t, span)) ** 3
    assert found is not None
    assert found in recipe.patterns(final, m)
    assert Fraction(found.n, m) >= density or found.n == m - 1
    assert Fraction(found.n - 1, m) < density
    assert found.n > n or n >= m - 1
    assert found.n <= max(m - 1, n)
    assert recipe.stage(span, span, final, m).pattern == final


def test_gradual_lists_every_pattern_once() -> None:
    listed = nmflow.Gradual().patterns(Pattern("1:128"), 128)
    assert [str(p) for p in listed] == [f"{n}:128" for n in range(127, 0, -1)]
    met = {s.pattern for s in walk(nmflow.Gradual(), 5000, "1:128")}
    assert met == set(listed)


@pytest.mark.parametrize(
    "recipe",
    [nmflow.MDGF(decay="linear", dense=0.1, finetune=0.2), nmflow.MDGF(dense=10, finetune=20)],
    ids=["fractions", "steps"],
)
def test_phases_in_fractions_or_steps(recipe: Any) -> None:
    stages = walk(recipe, 100, "1:4")
    assert [s.phase for s in stages].index("decay") == 10
    assert [s.phase for s in stages].index("finetune") == 80
    assert stages[80].delta == 0.0
    assert stages[79].delta > 0.0


RECIPES = st.one_of(
    st.builds(nmflow.STE, dense=st.integers(0, 5)),
    st.builds(nmflow.SRSTE, dense=st.integers(0, 5)),
    st.builds(nmflow.OneShot, dense=st.integers(0, 5)),
    st.builds(nmflow.SSTE, dense=st.integers(0, 5), scale=st.floats(0.5, 4)),
    st.builds(
        nmflow.MaxQ,
        schedule=st.sampled_from(["cosine", "linear"]),
        dense=st.integers(0, 5),
        finetune=st.integers(0, 5),
    ),
    st.builds(
        nmflow.Gradual,
        gradient=st.sampled_from(["straight-through", "masked"]),
        dense=st.integers(0, 5),
        finetune=st.integers(0, 5),
    ),
    st.builds(
        nmflow.MDGF,
        decay=st.sampled_from(["linear", "exponential"]),
        beta=st.none() | st.floats(1e-3, 3),
        gradient=st.sampled_from(["straight-through", "masked"]),
        dense=st.integers(0, 5),
        finetune=st.integers(0, 5),
    ),
    st.builds(
        nmflow.SDGF,
        structure=st.sampled_from(["stepwise", "geometric", "panels"]),
        dense=st.integers(0, 5),
        finetune=st.integers(0, 5),
    ),
    st.builds(
        nmflow.Settling,
        decay=st.sampled_from(["linear", "exponential"]),
        dense=st.integers(0, 5),
        finetune=st.integers(0, 5),
    ),
    st.builds(
        nmflow.Hybrid,
        structure=st.sampled_from(["stepwise", "geometric", "panels"]),
        decay=st.sampled_from(["linear", "exponential"]),
        dense=st.integers(0, 5),
        finetune=st.integers(0, 5),
    ),
)


@given(
    RECIPES,
    st.integers(11, 60),
    st.sampled_from(["1:2", "2:4", "1:4", "3:8", "1:16", "5:12", "1:4@4", "4:4"]),
    st.integers(1, 20),
)
def test_every_schedule(recipe: Any, total: int, pattern: str, groups: int) -> None:
    """Phases in their order, density and delta as they must be, N:M from K on, and no memory."""
    final = Pattern(pattern)
    length = groups * final.m
    stages = walk(recipe, total, pattern, length)
    order = ["dense", "decay", "sparse", "finetune", "final"]
    assert [s.phase for s in stages] == sorted((s.phase for s in stages), key=order.index)
    for k, stage in enumerate(stages):
        assert recipe.stage(k, total, final, length) == stage
        assert (stage.pattern is None) == (stage.phase == "dense")
        assert 0.0 <= stage.delta <= 1.0
        if stage.pattern is not None:
            assert length % stage.pattern.m == 0
            assert stage.pattern.density >= final.density
            assert final.panel % stage.pattern.panel == 0
        if stage.phase in ("sparse", "finetune", "final"):
            assert (stage.pattern, stage.delta) == (final, 0.0)
    densities = [s.pattern.density for s in stages if s.pattern is not None]
    assert densities == sorted(densities, reverse=True)
    if isinstance(recipe, nmflow.MDGF):
        deltas = [s.delta for s in stages if s.phase != "dense"]
        assert deltas == sorted(deltas, reverse=True)
        assert deltas[0] == 1.0
    for k in (total, total + 1, 10 * total):
        stage = recipe.stage(k, total, final, length)
        assert (stage.phase, stage.pattern, stage.delta) == ("final", final, 0.0)


NAMES = {
    "dense": nmflow.Dense(),
    "one-shot": nmflow.OneShot(),
    "ste": nmflow.STE(),
    "sr-ste": nmflow.SRSTE(),
    "gradual": nmflow.Gradual(),
    "mdgf-linear": nmflow.MDGF(decay="linear"),
    "mdgf-exponential": nmflow.MDGF(decay="exponential"),
    "sdgf-stepwise": nmflow.SDGF(structure="stepwise"),
    "sdgf-geometric": nmflow.SDGF(structure="geometric"),
    "sdgf-panels": nmflow.SDGF(structure="panels"),
    "hybrid": nmflow.Hybrid(),
    "maxq": nmflow.MaxQ(),
    "s-ste": nmflow.SSTE(),
    "settling": nmflow.Settling(),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert resolve(name) == NAMES[name]
    assert resolve(NAMES[name]) is NAMES[name]
    assert NAMES[name].name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMES[name].dense = 3  # type: ignore[misc]


def test_defaults() -> None:
    assert nmflow.SRSTE().lam == 2e-4
    assert nmflow.OneShot().dense == 0.5
    assert nmflow.MDGF().finetune == nmflow.SDGF().finetune == nmflow.Gradual().finetune == 0.2
    assert (nmflow.Gradual().gradient, nmflow.Gradual().dense) == ("masked", 0.0)
    assert (nmflow.MDGF().decay, nmflow.MDGF().beta) == ("exponential", None)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: resolve("mdgf"), "mdgf"),
        (lambda: resolve(3), "3"),  # type: ignore[arg-type]
        (lambda: nmflow.MDGF(beta=0.0), "beta"),
        (lambda: nmflow.MDGF(beta=-1.0), "beta"),
        (lambda: nmflow.MDGF(beta=float("nan")), "beta"),
        (lambda: nmflow.MDGF(beta=float("inf")), "beta"),
        (lambda: nmflow.Hybrid(beta=0), "beta"),
        (lambda: nmflow.MDGF(decay="cosine"), "cosine"),
        (lambda: nmflow.MDGF(gradient="none"), "gradient"),
        (lambda: nmflow.Gradual(gradient="none"), "gradient"),
        (lambda: nmflow.Gradual(dense=0.9, finetune=0.2), "0.9"),
        (lambda: nmflow.SDGF(structure="random"), "structure"),
        (lambda: nmflow.Hybrid(decay="x"), "decay"),
        (lambda: nmflow.MDGF(dense=0.6, finetune=0.6), "dense"),
        (lambda: nmflow.SDGF(dense=0.9, finetune=0.2), "0.9"),
        (lambda: nmflow.STE(dense=1.5), "1.5"),
        (lambda: nmflow.STE(dense=-0.1), "-0.1"),
        (lambda: nmflow.OneShot(dense=-3), "-3"),
        (lambda: nmflow.STE(dense="half"), "half"),  # type: ignore[arg-type]
        (lambda: nmflow.STE(dense=float("nan")), "nan"),
        (lambda: nmflow.STE(dense=True), "True"),
        (lambda: nmflow.SRSTE(lam=-1.0), "lam"),
        (lambda: nmflow.Settling(pull=-1.0), "pull"),
        (lambda: nmflow.Settling(pull=float("inf")), "pull"),
        (lambda: nmflow.Settling(pull=True), "pull"),
        (lambda: nmflow.Settling(decay="cosine"), "cosine"),
        (lambda: nmflow.Settling(dense=0.9), "0.9"),
        (lambda: nmflow.SRSTE(lam=float("nan")), "lam"),
    ],
)
def test_recipes_that_cannot_be_carried_out(build: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build()
    assert said in str(caught.value)


@pytest.mark.parametrize("total", [0, -1, 1.5, True, "9", 14, 15])
def test_total_steps_that_do_not_hold_the_phases(total: Any) -> None:
    with pytest.raises(RecipeError, match="total_steps"):
        nmflow.MDGF(dense=7, finetune=8).check(total)


@pytest.mark.parametrize("stairs", [1, 3, 16, 40])
@pytest.mark.parametrize("recipe", ["linear", "exponential", "stepwise", "geometric"])
def test_on_a_stair_all_is_as_at_its_first_step(recipe: str, stairs: int) -> None:
    """δ and the pattern change at no more than `stairs` steps, to what they are without stairs."""
    kind = nmflow.MDGF if recipe in ("linear", "exponential") else nmflow.SDGF
    smooth, stepped = kind(recipe, dense=3), kind(recipe, dense=3, stairs=stairs)
    total, pattern, end = 40, nmflow.Pattern("1:16"), 32
    stages = [stepped.stage(k, total, pattern, 128) for k in range(total + 2)]
    treads = {3 + math.ceil(i * (end - 3) / stairs) for i in range(stairs + 1)}
    for k in range(3, end):
        first = max(t for t in treads if t <= k)
        assert stages[k] == smooth.stage(first, total, pattern, 128)
        assert stepped.same_stair(k, total) == (k not in treads)
    assert stages[:3] == [smooth.stage(k, total, pattern, 128) for k in range(3)]
    assert stages[end:] == [smooth.stage(k, total, pattern, 128) for k in range(end, total + 2)]
    assert not stepped.same_stair(end, total)
    assert stepped.frozen_since(total) == end
    assert len({(s.delta, s.pattern) for s in stages[3:end]}) <= stairs


@pytest.mark.parametrize("stairs", [-1, 1.5, True, None])
def test_stairs_are_a_whole_number(stairs: object) -> None:
    for kind in (nmflow.MDGF, nmflow.SDGF, nmflow.Settling):
        with pytest.raises(RecipeError, match="stairs"):
            kind(stairs=stairs)  # type: ignore[arg-type]


def test_a_recipe_without_stairs_is_described_as_before_there_were_any() -> None:
    assert "stairs" not in nmflow.recipes.describe(nmflow.MDGF())
    assert nmflow.recipes.describe(nmflow.MDGF(stairs=4))["stairs"] == 4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dense"])
def test_scales_grow_with_the_sparsity(name: str) -> None:
    """1 while dense, the whole factor once N:M is reached, and never past it in between."""
    recipe = dataclasses.replace(NAMES[name], scale=1.6, lr_scale=0.5)
    pattern, total = Pattern("1:16"), 40
    stages = [recipe.stage(k, total, pattern, 256) for k in range(total + 2)]
    for stage in stages:
        come = stage.sparsity / pattern.sparsity
        assert 0 <= come <= 1 + 1e-9
        assert stage.gain == pytest.approx(1 + 0.6 * come)
        assert stage.rate == pytest.approx(1 - 0.5 * come)
    assert (stages[-1].gain, stages[-1].rate) == (1.6, 0.5)
    plain = [NAMES[name].stage(k, total, pattern, 256) for k in range(total + 2)]
    assert [dataclasses.replace(s, gain=1.0, rate=1.0) for s in stages] == plain


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "2"])
@pytest.mark.parametrize("name", ["scale", "lr_scale"])
def test_a_scale_is_a_factor(name: str, value: object) -> None:
    for kind in (nmflow.STE, nmflow.Settling, nmflow.MaxQ, nmflow.OneShot):
        with pytest.raises(RecipeError, match=name):
            kind(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="dense baseline"):
        nmflow.Dense(scale=2.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"schedule": "steps"}, "schedule"), ({"tau": 0}, "tau"), ({"lam": -1.0}, "lam")],
)
def test_what_maxq_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        nmflow.MaxQ(**options)
