"""What the loss feels at the outputs of linears: weights of tokens, second moments of gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.collect import batches, pass_block
from jaxquant.errors import NonFiniteError
from jaxquant.evaluate.scoring import head_only, next_token_nll, over_tokens
from jaxquant.io.source import Source
from jaxquant.models.config import LINEARS, ModelConfig
from jaxquant.models.decoder import block, embed, rms_norm

TokenWeights = dict[str, np.ndarray]


def fisher_weights(
    source: Source,
    tokens: np.ndarray,
    *,
    relative: bool = True,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[TokenWeights]:
    """Squared loss gradients of the unquantized model at the outputs of its linears, token by token.

        r_t = sum_linears |dL/dy_t|^2 / mean_t,   L = sum_t -log p(token t | tokens < t)

    summed over the linears that read a tap, with mean 1 over the tokens. `observe(x, weights=r)` then gives
    `sum r_t x_t x_t^T`, the Fisher matrix averaged over output channels: what the loss, not the layer's
    output, pays for a change of the weight. Massive tokens carry next to no gradient and drop out.
    Form (b) of OSAQ's Hessian (arXiv 2605.04738 leaves the choice open); GuidedQuant (arXiv 2505.07004)
    averages over groups of channels.

    The backward pass goes block by block, `jax.vjp` of one at a time; a batch of tokens keeps the inputs of
    all blocks, 4 bytes a number.

    Args:
      source: the model; blocks are read twice per batch.
      tokens: int32 `[samples, seqlen]`.
      relative: divide by the mean, which other tokens do not share: without it the gradients of several
        texts can be compared.
      on_block: called with `(blocks done, blocks in total)`, forward and backward counted.

    Returns:
      For every block, by tap, float32 `[samples, seqlen]`; relative weights are 1 where all gradients of a
      tap are 0.

    Raises:
      NonFiniteError: a gradient is NaN or infinite; names the block and tap.
    """
    found: list[TokenWeights] = [
        {tap: np.zeros(tokens.shape, np.float32) for tap, _ in LINEARS}
        for _ in range(source.config.num_layers)
    ]
    for index, part, norms in _walk_back(source, tokens, _norms_by_tap, on_block):
        for tap, norm in norms.items():
            found[index][tap][part] = norm
    for index, weights in enumerate(found):
        for tap, weight in weights.items():
            mean = weight.mean(dtype=np.float64)
            if not np.isfinite(mean):
                raise NonFiniteError(
                    f"blocks.{index}.{tap}: the gradient of the loss is not finite; check the model file, "
                    "or leave the Hessian at 'input'"
                )
            if relative:
                weights[tap] = (weight / mean if mean > 0 else np.ones_like(weight)).astype(np.float32)
    return found


def output_moments(
    source: Source,
    tokens: np.ndarray,
    *,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, np.ndarray]]:
    """Second moments of the loss gradients at the outputs of linears: `Ho = sum_t g_t g_t^T`, `g = dL/dy`.

    Of the unquantized model and the summed loss, like `fisher_weights`; `methods.fine` weighs errors on the
    way back with them. The first token of a window, on which attention heaps what it has no use for, is left
    out.

    Args:
      source: the model.
      tokens: int32 `[samples, seqlen]`.
      on_block: called with `(blocks done, blocks in total)`, forward and backward counted.

    Returns:
      For every block, by path (`mlp.down`), float32 `[out, out]`.

    Raises:
      NonFiniteError: a gradient is NaN or infinite; names the linear.
    """
    found: list[dict[str, np.ndarray]] = [{} for _ in range(source.config.num_layers)]
    for index, _, moments in _walk_back(source, tokens, _second_by_path, on_block):
        for path, second in moments.items():
            if not np.all(np.isfinite(second)):
                raise NonFiniteError(
                    f"blocks.{index}.{path}: the gradient of the loss is not finite; check the model file"
                )
            found[index][path] = found[index].get(path, 0) + np.asarray(second)
    return found


#: Maps gradients `[B, T, out]` at the outputs of the linears of a block, by path, to what is kept of them.
_Reduce = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def _walk_back(
    source: Source, tokens: np.ndarray, reduce: _Reduce, on_block: Callable[[int, int], None]
) -> Iterator[tuple[int, slice, dict[str, jax.Array]]]:
    """`(block, samples, reduced gradients)` of every block and batch, from the last block to the first."""
    config = source.config.in_floats()
    outer = jax.tree.map(jnp.asarray, source.outer())
    parts = list(batches(tokens))
    total = 2 * config.num_layers * len(parts)
    for number, part in enumerate(parts):
        done = 2 * config.num_layers * number
        x = embed(outer, config, jnp.asarray(tokens[part]))
        inputs = []
        for index in range(config.num_layers):
            inputs.append(np.asarray(x))
            x = pass_block(source.block(index), config, x, sliding=config.slides(index))
            on_block(done := done + 1, total)
        cotangent = _loss_gradient(outer, config, x, jnp.asarray(tokens[part]))
        for index in reversed(range(config.num_layers)):
            reduced, cotangent = _pull_back(
                source.block(index), config, inputs.pop(), cotangent, reduce, sliding=config.slides(index)
            )
            yield index, part, reduced
            on_block(done := done + 1, total)


def _norms_by_tap(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Squared norms `[B, T]`, summed over the linears that read a tap."""
    squared = {path: jnp.sum(jnp.square(g), axis=-1) for path, g in gradients.items()}
    return {tap: functools.reduce(jnp.add, (squared[path] for path in paths)) for tap, paths in LINEARS}


def _second_by_path(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def second(g: jax.Array) -> jax.Array:
        rows = g[:, 1:].reshape(-1, g.shape[-1])
        return jnp.matmul(rows.T, rows, precision="highest")

    return {path: second(g) for path, g in gradients.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shifted:
    """A kernel whose product is shifted: the gradient with respect to `shift` is that of the output."""

    kernel: jax.Array
    shift: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, self.kernel.astype(x.dtype)) + self.shift


@functools.partial(jax.jit, static_argnames=("config", "reduce", "sliding"))
def _pull_back(
    params: Any,
    config: ModelConfig,
    x: jax.Array | np.ndarray,
    cotangent: jax.Array,
    reduce: _Reduce,
    *,
    sliding: bool,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The reduced gradients, and the gradient at the block's input."""
    paths = [path.split(".") for _, paths in LINEARS for path in paths]

    def run(x: jax.Array, shifts: dict[str, jax.Array]) -> jax.Array:
        shifted = {**params, "attn": dict(params["attn"]), "mlp": dict(params["mlp"])}
        for part, name in paths:
            linear = params[part][name]
            shifted[part][name] = {**linear, "kernel": _Shifted(linear["kernel"], shifts[f"{part}.{name}"])}
        return block(shifted, config, x, sliding=sliding)[0]

    shifts = {
        f"{part}.{name}": jnp.zeros((*x.shape[:2], params[part][name]["kernel"].shape[1]), x.dtype)
        for part, name in paths
    }
    _, pull = jax.vjp(run, x, shifts)
    at_input, at_outputs = pull(cotangent)
    return reduce({path: g.astype(jnp.float32) for path, g in at_outputs.items()}), at_input


@functools.partial(jax.jit, static_argnames="config")
def _loss_gradient(outer: Any, config: ModelConfig, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gradient of the summed loss with respect to what leaves the last block, `[B, T, d]`."""
    score = jax.checkpoint(functools.partial(next_token_nll, head_only(outer, config), config))

    def loss(x: jax.Array) -> jax.Array:
        hidden = rms_norm(x[:, :-1], outer["norm"], config)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return jnp.sum(over_tokens(score, config.vocab_size, hidden, tokens[:, 1:].reshape(-1)))

    return jax.grad(loss)(x)
