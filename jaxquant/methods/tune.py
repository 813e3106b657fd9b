"""Scales of a rounded block, learned so that it passes activations and gradients like the original (FINE).

Linears are rounded one by one; what their errors do to one another, behind attention and gate, only the block
shows. The integers stay; a factor for every scale is learned by gradient descent. Formulas ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.errors import UsageError
from jaxquant.methods.rounded import relative_energy
from jaxquant.quant import QArray, working_dtype

# Every fourth sample judges, these many at most.
_EVERY, _JUDGES = 4, 4
# Judgements of a run, at most.
_ROUNDS = 8

#: `(block_params, h [B, T, d]) -> [B, T, d]`.
Block = Callable[[Any, jax.Array], jax.Array]


@functools.partial(
    jax.jit, static_argnames=("apply", "reference", "weight", "steps", "learning_rate", "batch", "seed")
)
def tune_scales(
    params: Any,
    original: Any,
    inputs: Float[Array, "samples seqlen d"],
    *,
    apply: Block,
    reference: Block | None = None,
    weight: float = 0.1,
    steps: int = 48,
    learning_rate: float = 5e-3,
    batch: int = 1,
    seed: int = 0,
) -> tuple[Any, Float[Array, " pair"]]:
    """Adam on a factor `exp(m)` for every scale of a block, its rate decaying like a cosine.

        |B_q(h) - B(h)|^2 / |B(h) - h|^2 + weight |J_q^T v - J^T v|^2 / |J^T v - v|^2,   v ~ N(0, 1)

    J is the Jacobian at h; h and v are the same for both blocks, and v for a sample is drawn once. What both
    are measured by is what the block adds to the stream and to gradients. The first token of a sample, on
    which attention heaps what it has no use for, is left out. Every fourth sample judges, up to four of them
    (all samples, where there are fewer than four, and they teach as well): of the factors after 0, 1/8, ..,
    8/8 of the steps (fewer where 8 does not divide them) those are taken that leave the least on them, scales
    as they will be stored. So the result is never worse than the start there.

    Args:
      params: of the block, with `QArray` kernels; what is in floats stays.
      original: of the original block.
      inputs: h, of both.
      apply: the quantized block (static; give the same function for every block).
      reference: the original one, where it is another function (activations are not rounded); static.
      weight: price of the gradients; 0 is plain block reconstruction, for a third of the time.
      steps: of Adam; 0 changes nothing.
      learning_rate: the first; m moves by about that a step.
      batch: samples a step.
      seed: of v and of the order of samples.

    Returns:
      `params` with other scales, in `grid.scale_dtype`, and the judged objective before and after.

    Raises:
      UsageError: no samples, a negative weight or number of steps, or a rate or batch that is not positive.
    """
    import optax

    if not (weight >= 0 and learning_rate > 0) or steps < 0 or batch < 1:
        raise UsageError(
            f"tune: weight={weight} and steps={steps} must not be negative, learning_rate={learning_rate} "
            f"and batch={batch} must be positive; .1, 48, .005 and 1 are usual"
        )
    samples, wide = range(inputs.shape[0]), working_dtype(inputs.dtype)
    if not samples:
        raise UsageError("tune: no samples; give inputs [samples, seqlen, d]")
    judges = [i for i in samples if i % _EVERY == _EVERY - 1][:_JUDGES]
    taught = jnp.asarray([i for i in samples if i not in judges])
    judging = jnp.asarray(judges or list(samples))
    key_of_cotangents, key_of_order = jax.random.split(jax.random.key(seed))
    cotangents = jax.random.normal(key_of_cotangents, inputs.shape, inputs.dtype)

    def respond(apply: Block, params: Any, h: Array, v: Array) -> tuple[Array, ...]:
        """What the block adds to the stream and to gradients, behind the first token."""
        if weight == 0:
            return ((apply(params, h).astype(h.dtype) - h)[:, 1:],)
        y, pull = jax.vjp(lambda h: apply(params, h).astype(h.dtype), h)
        v = v.at[:, 0].set(0)
        return (y - h)[:, 1:], (pull(v)[0] - v)[:, 1:]

    wanted = jax.lax.map(
        lambda pair: tuple(a[0] for a in respond(reference or apply, original, pair[0][None], pair[1][None])),
        (inputs, cotangents),
    )
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_packed)
    start: Any = [jnp.zeros(leaf.scale.shape, wide) if _is_packed(leaf) else None for leaf in leaves]

    def moved(moves: list[Any], *, stored: bool) -> list[Any]:
        found = []
        for leaf, move in zip(leaves, moves, strict=True):
            if move is not None:
                scale = leaf.scale.astype(move.dtype) * jnp.exp(move)
                scale = leaf.grid.storable(scale).astype(leaf.scale.dtype) if stored else scale
                leaf = dataclasses.replace(leaf, scale=scale)
            found.append(leaf)
        return found

    def objective(moves: list[Any], some: Array, *, stored: bool) -> Array:
        dense = [
            leaf.dequantize(inputs.dtype) if _is_packed(leaf) else leaf
            for leaf in moved(moves, stored=stored)
        ]
        ours = respond(apply, jax.tree.unflatten(tree, dense), inputs[some], cotangents[some])
        total = jnp.zeros((), wide)
        for price, a, b in zip((1.0, weight), ours, wanted, strict=False):
            apart, size = (jnp.sum(jnp.square(e.astype(wide))) for e in (a - b[some], b[some]))
            total += price * relative_energy(apart, size)
        return total

    def judge(moves: list[Any]) -> Array:
        return jnp.mean(jax.lax.map(lambda i: objective(moves, i[None], stored=True), judging))

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))

    def step(state: tuple[Any, Any], some: Array) -> tuple[tuple[Any, Any], None]:
        moves, memory = state
        gradient = jax.grad(lambda moves: objective(moves, some, stored=False))(moves)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(moves, updates), memory), None

    def some_steps(state: Any, order: Array) -> tuple[Any, None]:
        running, best, least = state
        running, _ = jax.lax.scan(step, running, order)
        found = judge(running[0])
        # NaN is not less.
        best = jax.tree.map(lambda new, old: jnp.where(found < least, new, old), running[0], best)
        return (running, best, jnp.where(found < least, found, least)), None

    before = judge(start)
    rounds = max(d for d in range(1, _ROUNDS + 1) if steps % d == 0)
    order = jax.random.choice(key_of_order, taught, (rounds, steps // rounds, batch))
    state = ((start, optimizer.init(start)), start, before)
    (_, best, after), _ = jax.lax.scan(some_steps, state, order)
    return jax.tree.unflatten(tree, moved(best, stored=True)), jnp.stack([before, after])


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QArray)
