"""SpinQuant: rotations learned by gradient descent on the orthogonal group (arXiv 2405.16406).

QuaRot's random bases are as good as chance has them. Here the loss of the model, its activations and cache
quantized and its weights in floating point, is a function of the bases, and Cayley's transform of a skew
matrix keeps them orthogonal at every step (Li, Fuxin and Todorovic, arXiv 2002.01113):

    A = (R^T G - G^T R) / 2,  G = dL/dR;   R <- R (I - U/2)^{-1} (I + U/2),  U = -rate A

To first order the loss changes by `<G, R U> = <A, U> = -rate |A|^2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.errors import NonFiniteError
from jaxquant.models.config import LINEARS

if TYPE_CHECKING:
    import optax

#: Orthogonal matrices `[..., n, n]` by name.
Turns = dict[str, jax.Array]

_READERS = [path for tap, paths in LINEARS if tap in ("attn_in", "mlp_in") for path in paths]
_WRITERS = [path for tap, paths in LINEARS if tap in ("attn_out", "mlp_hidden") for path in paths]


def spin(
    loss: Callable[[Turns, Any], jax.Array],
    start: Turns,
    data: Iterable[Any],
    optimizer: optax.GradientTransformation,
) -> dict[str, np.ndarray]:
    """Descends from `start` along `loss`, a step for each element of `data`.

    Args:
      loss: `(turns, element) -> scalar`, differentiable; compiled once, so elements have equal shapes.
      start: orthogonal matrices `[..., n, n]`, float32.
      data: pytrees of arrays.
      optimizer: see `cayley_step`.

    Returns:
      The orthogonal matrices nearest to the last ones, float64.

    Raises:
      NonFiniteError: NaN or infinity in the loss or its gradient; names the step.
    """

    @jax.jit
    def step(turns: Turns, state: Any, element: Any) -> tuple[jax.Array, jax.Array, Turns, Any]:
        value, gradients = jax.value_and_grad(loss)(turns, element)
        finite = jnp.isfinite(value)
        for gradient in jax.tree.leaves(gradients):
            finite &= jnp.all(jnp.isfinite(gradient))
        return value, finite, *cayley_step(turns, gradients, optimizer, state)

    turns, state = start, optimizer.init(start)
    for number, element in enumerate(data):
        value, finite, turns, state = step(turns, state, element)
        if not finite:
            raise NonFiniteError(
                f"SpinQuant: at step {number} the loss is {value:g} and it or its gradient is not finite; "
                "use a smaller learning_rate, or check the model file"
            )
    return {name: nearest_orthogonal(np.asarray(turn)) for name, turn in turns.items()}


def cayley_step(
    turns: Turns, gradients: Turns, optimizer: optax.GradientTransformation, state: Any
) -> tuple[Turns, Any]:
    """One step of `optimizer` in the Lie algebra: `R (I - U/2)^{-1} (I + U/2)`, U its update for A.

    Args:
      turns: R, orthogonal `[..., n, n]`.
      gradients: `dL/dR`, likewise.
      optimizer: must map skew matrices to skew matrices, as linear ones do (`optax.sgd`, with momentum and
        any schedule) and odd functions of single entries (`optax.adam`); weight decay and what looks at R do
        not belong here.
      state: of the optimizer, from `optimizer.init(turns)`.

    Returns:
      The matrices after the step, orthogonal up to rounding, and the state.
    """

    def skew(turn: Array, gradient: Array) -> Array:
        product = _transposed(turn, gradient)
        return (product - jnp.swapaxes(product, -1, -2)) / 2

    def move(turn: Array, update: Array) -> Array:
        one = jnp.broadcast_to(jnp.eye(turn.shape[-1], dtype=turn.dtype), turn.shape)
        # Eigenvalues of a skew matrix are imaginary, so the system is never singular.
        moved = _product("...ij,...jk->...ik", turn, jnp.linalg.solve(one - update / 2, one + update / 2))
        # Rounding would add up to 1e-5 in 30 steps of 576 channels; Newton's step squares the deviation.
        return _product("...ij,...jk->...ik", moved, (3 * one - _transposed(moved, moved)) / 2)

    updates, state = optimizer.update(jax.tree.map(skew, turns, gradients), state)
    return jax.tree.map(move, turns, updates), state


def nearest_orthogonal(a: np.ndarray) -> np.ndarray:
    """The orthogonal factor `U V^T` of `a = U S V^T` `[..., n, n]`, which is nearest to it; float64."""
    u, _, v = np.linalg.svd(a.astype(np.float64))
    return u @ v


def turn_blocks(blocks: Mapping[str, Any], turns: Turns) -> dict[str, Any]:
    """What `methods.rotate` does to blocks by the bases that are learned; differentiable.

        W_{q,k,v,gate,up} <- R1^T W;  W_{o,down} <- W R1 and their biases b R1
        W_v <- W_v (I (x) R2), its bias likewise;  W_o <- (I (x) R2^T) W_o

    Args:
      blocks: parameters of all blocks, stacked; norms folded, no inner norms behind `o` and `down`.
      turns: `residual` R1 `[d, d]`, `values` R2 `[layers, kv_heads, head_dim, head_dim]`.
    """
    residual, values = turns["residual"], turns["values"]
    layers, heads, size, _ = values.shape
    turned = {**blocks, "attn": dict(blocks["attn"]), "mlp": dict(blocks["mlp"])}

    def outputs(a: Float[Array, "layers *rows kv"]) -> Float[Array, "layers *rows kv"]:
        return _product("lnhi,lhij->lnhj", a.reshape(layers, -1, heads, size), values).reshape(a.shape)

    def inputs(kernel: Float[Array, "layers n d"]) -> Float[Array, "layers n d"]:
        # Query heads that share a value head are neighbours.
        split = kernel.reshape(layers, heads, -1, size, kernel.shape[-1])
        return _product("lhij,lhgim->lhgjm", values, split).reshape(kernel.shape)

    def edit(path: str, kernel: Callable[..., Array], bias: Callable[..., Array] = lambda b: b) -> None:
        part, name = path.split(".")
        changes = {"kernel": kernel, "bias": bias}
        turned[part][name] = {key: changes[key](leaf) for key, leaf in turned[part][name].items()}

    for path in _READERS:
        edit(path, lambda kernel: _product("ij,lim->ljm", residual, kernel))
    for path in _WRITERS:
        edit(
            path,
            lambda kernel: _product("lni,ij->lnj", kernel, residual),
            lambda bias: _product("li,ij->lj", bias, residual),
        )
    edit("attn.v", outputs, outputs)
    edit("attn.o", inputs)
    return turned


def _transposed(a: Array, b: Array) -> Array:
    """`a^T b`."""
    return _product("...ki,...kj->...ij", a, b)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, precision="highest")
