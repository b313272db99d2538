"""Recipes for JAX: masks as pure functions of arrays, and a recipe around an optax transformation.

The schedules are those of `nmflow.recipes`, which know neither framework. Dense weights live in the
optimizer's state here too, and the parameters are sparse. Install `nmflow[jax]`.
"""

# Where it looks for JAX, pyright finds this very file.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nmflow.errors import PatternError, PlanError, RecipeError
from nmflow.pattern import Pattern
from nmflow.recipes import DEFAULT, Recipe, resolve

__all__ = ["Sparse", "SparseState", "kernels", "mask", "project", "sparse"]

Targets = Callable[[str, Any], int | None]
"""From a parameter's path and value to its grouped axis, the inputs; None leaves it dense."""


# -- pure functions of arrays ------------------------------------------------------------------


def mask(w: jax.Array, pattern: str | Pattern, axis: int = -2) -> jax.Array:
    r"""The magnitude mask: True at the N largest \|w\| of every M along an axis.

    Args:
        w: the weight, of at least two axes.
        pattern: `"N:M"`, or `"N:M@V"`: V consecutive outputs share the kept inputs, by Σ\|w\|.
        axis: the axis of the inputs: -2 for `(…, in, out)`, as flax has it; of the last two axes
            the other one is that of the outputs.

    Returns:
        A bool array of the shape of `w`; ties go to the lower index. Whole groups of NaN keep N.

    Raises:
        PatternError: M does not divide the axis.

    Example:
        >>> mask(jnp.array([[1.0], [-4.0], [2.0], [3.0]]), "2:4")[:, 0].tolist()
        [False, True, False, True]
    """
    pattern = Pattern(pattern)
    axis = axis % w.ndim
    size = w.shape[axis]
    if size % pattern.m:
        raise PatternError(
            f"pattern is '{pattern}', but axis {axis} of {w.shape} is not a multiple of "
            f"M={pattern.m}"
        )
    out = w.ndim - 2 if axis == w.ndim - 1 else w.ndim - 1
    # (…, out, in): groups lie side by side at the end, panels before them.
    score = jnp.moveaxis(jnp.abs(w), (out, axis), (-2, -1))
    shape, v = score.shape, pattern.panel
    rows = -(-shape[-2] // v)
    if v > 1:
        spare = [(0, 0)] * (score.ndim - 2) + [(0, rows * v - shape[-2]), (0, 0)]
        score = jnp.pad(score, spare).reshape(*shape[:-2], rows, v, size).sum(-2)
    groups = score.reshape(*score.shape[:-1], size // pattern.m, pattern.m)
    order = jnp.argsort(-groups, axis=-1, stable=True)
    kept = (jnp.argsort(order, axis=-1) < pattern.n).reshape(score.shape)
    if v > 1:
        kept = jnp.repeat(kept, v, axis=-2)[..., : shape[-2], :]
    return jnp.moveaxis(kept, (-2, -1), (out, axis))


def project(
    w: jax.Array, kept: jax.Array, fading: jax.Array | None = None, delta: Any = 0.0
) -> jax.Array:
    """`W̃ = W ⊙ (m + (1 - m) ⊙ m' · δ)`, with exact zeros where δ is 0.

    Args:
        w: the dense weight W.
        kept: the bool mask m.
        fading: the bool mask m' of the weights that may still fade; None lets all of them.
        delta: δ.

    Example:
        >>> project(jnp.array([4.0, 2.0]), jnp.array([True, False]), delta=0.5).tolist()
        [4.0, 1.0]
    """
    delta = jnp.asarray(delta, w.dtype)
    faded = jnp.where(delta == 0, jnp.zeros_like(w), w * delta)
    if fading is not None:
        faded = jnp.where(fading, faded, jnp.zeros_like(w))
    return jnp.where(kept, w, faded)


def kernels(path: str, value: Any) -> int | None:
    """The grouped axis of flax's and haiku's matrices: -2 of each `kernel` and `w`, no vectors."""
    name = path.rpartition("/")[2]
    return -2 if name in ("kernel", "w") and value.ndim >= 2 else None


# -- a recipe around a transformation ----------------------------------------------------------


class SparseState(NamedTuple):
    """The state of `sparse`: everything that a resume needs.

    Attributes:
        step: the steps done.
        dense: W of each target by its path.
        held: the masks that are held, by path; empty for recipes that hold none.
        inner: the state of the transformation inside.
    """

    step: jax.Array
    dense: dict[str, jax.Array]
    held: dict[str, jax.Array]
    inner: Any


class Sparse(NamedTuple):
    """An optax transformation, `init` and `update`, with what shows the sparse weights.

    Attributes:
        init: as of any transformation; the parameters that it is given are W.
        update: as of any transformation; gradients and parameters are those of W̃.
        show: from a state and parameters to the parameters with exactly W̃ in every target.
    """

    init: Callable[[Any], SparseState]
    update: Callable[..., tuple[Any, SparseState]]
    show: Callable[[SparseState, Any], Any]


def sparse(
    inner: optax.GradientTransformation,
    recipe: str | Recipe = DEFAULT,
    pattern: str | Pattern = "1:16",
    *,
    total_steps: int,
    targets: Targets = kernels,
    learning_rate: float | optax.Schedule | None = None,
) -> Sparse:
    """Train to N:M sparsity: a recipe around an optax transformation, which steps the dense W.

    Updates lead from W̃ to the next W̃, so that `optax.apply_updates` works; what the masks prune is
    exactly 0 then, and the rest within a rounding of W. `show` gives it to the last bit.

    Args:
        inner: the optimizer, such as `optax.adamw(1e-3)`.
        recipe: a name or a recipe, see `nmflow.attach`; all but STEP, which holds Adam's state, and
            those that change kept weights or the pace of a step: S-STE, MaxQ, and any with a
            `scale` or an `lr_scale`.
        pattern: N:M with N kept, or N:M@V.
        total_steps: K, the steps of the whole run.
        targets: which parameters are pruned, along which axis, from path and value.
        learning_rate: that of `inner`, which a recipe with a pull (`settling`) needs.

    Returns:
        A `Sparse`. All that it does can be compiled with `jax.jit`.

    Raises:
        RecipeError: an unknown recipe, phases that do not fit, a recipe that is not in JAX, or a
            pull without a rate.
        PlanError: at `init`, where no parameter is a target.
        PatternError: at `init`, where M does not divide an axis.

    Example:
        >>> params = {"fc": {"kernel": jnp.ones((16, 4)) * jnp.arange(16.0)[:, None]}}
        >>> tx = sparse(optax.adamw(1e-3), "mdgf-linear", "1:16", total_steps=10)
        >>> state = tx.init(params)
        >>> params = tx.show(state, params)
        >>> for _ in range(10):
        ...     grads = jax.grad(lambda p: (p["fc"]["kernel"] ** 2).sum())(params)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = tx.show(state, optax.apply_updates(params, updates))
        >>> int((params["fc"]["kernel"] != 0).sum())  # of 16 × 4
        4

    References:
        arXiv 2402.04744. As in `nmflow.attach`, the mask is taken once a step.
    """
    known, final = resolve(recipe), Pattern(pattern)
    known.check(total_steps)
    if known.freezes_second_moment or known.form or (known.scale, known.lr_scale) != (1.0, 1.0):
        raise RecipeError(
            f"recipe is {known.name!r} with scale={known.scale} and lr_scale={known.lr_scale}, "
            "which needs more than masks, δ and a pull: choose another, such as 'sr-ste', or torch"
        )
    if known.pull and learning_rate is None:
        raise RecipeError(
            f"learning_rate is None, but {known.name} draws weights at it: give that of the "
            "optimizer inside, or choose a recipe without a pull, such as 'mdgf-linear'"
        )
    course = _Course(known, final, total_steps)

    def axes(params: Any) -> dict[str, int]:
        found = {path: targets(path, x) for path, x in _leaves(params) if known.prunes}
        return {path: axis for path, axis in found.items() if axis is not None}

    def init(params: Any) -> SparseState:
        chosen, leaves = axes(params), dict(_leaves(params))
        if known.prunes and not chosen:
            raise PlanError(
                "targets chooses no parameter: give a function that names the axis of at least one"
            )
        dense = {path: jnp.asarray(leaves[path]) for path in chosen}
        for path, axis in chosen.items():
            for used in known.patterns(final, dense[path].shape[axis]):
                mask(dense[path], used, axis)
        state = SparseState(jnp.zeros((), jnp.int32), dense, {}, inner.init(params))
        return holding(state, chosen)

    def masks(state: SparseState, path: str, axis: int) -> tuple[Any, Any, Any]:
        kept, fading, delta = course.at(state.step, state.dense[path], axis)
        if path in state.held:
            again = jnp.asarray(course.held)[jnp.minimum(state.step, total_steps + 1)]
            kept = jnp.where(again, state.held[path], kept)
        return kept, fading, delta

    def holding(state: SparseState, chosen: dict[str, int]) -> SparseState:
        held = {p: masks(state, p, axis)[0] for p, axis in chosen.items() if any(course.held)}
        return state._replace(held=held)

    def show(state: SparseState, params: Any) -> Any:
        chosen = axes(params)
        shown = {p: project(state.dense[p], *masks(state, p, axis)) for p, axis in chosen.items()}
        return _replaced(params, shown)

    def update(grads: Any, state: SparseState, params: Any = None) -> tuple[Any, SparseState]:
        if params is None:
            raise PlanError("params is None: pass update() the parameters, which it leads to W̃")
        chosen, found = axes(params), dict(_leaves(grads))
        ruled, drawn = {}, {}
        for path, axis in chosen.items():
            w, g = state.dense[path], found[path]
            kept, fading, delta = masks(state, path, axis)
            shown = project(w, kept, fading, delta)
            if known.gradient == "masked":
                g = project(g, kept, fading, delta)
            if known.lam:
                g = g + known.lam * (w - shown)
            ruled[path] = g
            if known.pull:
                lr = learning_rate(state.step) if callable(learning_rate) else learning_rate
                amount = jnp.minimum(1.0, jnp.asarray(lr) * known.pull).astype(w.dtype)
                w = jnp.where(delta == 1, w, (1 - amount) * w + amount * shown)
            drawn[path] = w
        dense = _replaced(params, drawn)
        steps, within = inner.update(_replaced(grads, ruled), state.inner, dense)
        moved = optax.apply_updates(dense, steps)
        after = dict(_leaves(moved))
        dense = {p: after[p] for p in chosen}
        state = holding(SparseState(state.step + 1, dense, state.held, within), chosen)
        shown = show(state, moved)
        return jax.tree.map(lambda new, old: new - old, shown, params), state

    return Sparse(init, update, show)


class _Course:
    """The stages of a run as tables over the step, so that a compiled step can look them up."""

    def __init__(self, recipe: Recipe, pattern: Pattern, total_steps: int) -> None:
        self._recipe, self._pattern, self._total = recipe, pattern, total_steps
        self._tables: dict[int, tuple[list[tuple[Pattern | None, Pattern | None]], Any, Any]] = {}
        since = recipe.frozen_since(total_steps) if recipe.prunes else None
        # Whether the mask after k steps is that of k - 1; the last stands for all that follow.
        self.held = [
            (since is not None and k > since) or recipe.same_stair(k, total_steps)
            for k in range(total_steps + 2)
        ]

    def at(self, step: jax.Array, w: jax.Array, axis: int) -> tuple[Any, Any, Any]:
        """m, m' and δ of a weight after `step` steps."""
        kinds, which, deltas = self._table(w.shape[axis])
        nth = jnp.minimum(step, self._total)
        every = jnp.ones(w.shape, bool)

        def of(kind: tuple[Pattern | None, Pattern | None]) -> Callable[[jax.Array], Any]:
            return lambda x: tuple(every if p is None else mask(x, p, axis) for p in kind)

        kept, fading = jax.lax.switch(jnp.asarray(which)[nth], [of(kind) for kind in kinds], w)
        return kept, fading, jnp.asarray(deltas)[nth]

    def _table(self, length: int) -> Any:
        if length not in self._tables:
            steps = range(self._total + 1)
            stages = [self._recipe.stage(k, self._total, self._pattern, length) for k in steps]
            kinds = list(dict.fromkeys(stage.masks for stage in stages))
            which = [kinds.index(stage.masks) for stage in stages]
            self._tables[length] = kinds, which, [float(stage.delta) for stage in stages]
        return self._tables[length]


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with its path, such as `"fc/kernel"`."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _replaced(tree: Any, by: dict[str, jax.Array]) -> Any:
    """The tree with other values at some paths."""
    named = [by.get(path, leaf) for path, leaf in _leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), named)
