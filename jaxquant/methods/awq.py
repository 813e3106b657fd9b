"""AWQ: large inputs are scaled up in the weight and down where they come from (arXiv 2306.00978)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.calibrate.moments import Moments
from jaxquant.errors import UsageError
from jaxquant.methods.rounded import layer_error
from jaxquant.quant import Grid, working_dtype

# Tap: the linears that read it, and what makes it - a norm of the block or, of the same part, a linear.
_FOLDS = {
    "attn_in": ("attn", ("q", "k", "v"), "attn_norm"),
    "attn_out": ("attn", ("o",), "v"),
    "mlp_in": ("mlp", ("gate", "up"), "mlp_norm"),
    "mlp_hidden": ("mlp", ("down",), "up"),
}
_SMALLEST_SCALE = 1e-4


@functools.partial(jax.jit, static_argnames=("grid", "norm_plus_one", "equal_heads", "steps", "apply"))
def awq(
    block_params: Mapping[str, Any],
    moments: Mapping[str, Moments],
    grid: Grid,
    *,
    norm_plus_one: bool,
    equal_heads: bool,
    steps: int = 20,
    apply: Callable[[Mapping[str, Any], Array], Array] | None = None,
    inputs: Float[Array, "samples seqlen d"] | None = None,
) -> tuple[dict[str, Any], dict[str, Moments]]:
    """Scales the inputs of every linear of a block, `w <- diag(s) w`, and divides what makes them by s.

    The block computes what it computed; see `awq_scale` for s. Norms make the inputs of q, k, v and of gate,
    up; the columns of v make those of o, the columns of up those of down. A column that is divided takes its
    grid with it, so the folds do not disturb each other.

    Args:
      block_params: `{"attn_norm": [d], "attn": {"q": {"kernel": [in, out], "bias": [out]}, ...}, "mlp_norm":
        [d], "mlp": {...}}`, float kernels.
      moments: of the inputs, by tap (`attn_in`, `attn_out`, `mlp_in`, `mlp_hidden`); a tap that is not given
        is left alone.
      grid: static.
      norm_plus_one: a norm multiplies by 1 + its weight (Gemma).
      equal_heads: there are as many value heads as query heads. Where they are fewer, several inputs of o
        come from one column of v, and `attn_out` is left alone as in the paper's code.
      steps: see `awq_scale`.
      apply, inputs: `apply(block_params, inputs)` is the block's output (static; give the same function for
        every block). With both, the exponent is the one with the least error of that output, the linears of
        one tap rounded at a time, as in the paper, all tokens of `inputs` alike; else that of `awq_scale`.

    Returns:
      The parameters, those that changed in float32 (float64 where they or the moments are): Gemma's `1 + w`
      leaves a half too few digits. And the moments of the scaled inputs, for whatever method follows.

    Raises:
      UsageError: the group size does not divide `in`, a tap is unknown, or one of `apply` and `inputs` is
        missing.
    """
    if (apply is None) != (inputs is None):
        raise UsageError("awq: the block objective needs both apply and inputs")
    unknown = set(moments) - set(_FOLDS)
    if unknown:
        raise UsageError(f"awq: unknown taps {sorted(unknown)}; there are {', '.join(_FOLDS)}")
    block: dict[str, Any] = dict(block_params)
    output_of = None
    if apply is not None and inputs is not None:
        output_of = functools.partial(_output_error, apply, inputs, block_params, apply(block_params, inputs))
    scaled = dict(moments)
    for tap, (part, readers, maker) in _FOLDS.items():
        if tap not in moments or (tap == "attn_out" and not equal_heads):
            continue
        linears = dict(block[part])
        kernels = tuple(linears[name]["kernel"] for name in readers)
        output_error = None if output_of is None else functools.partial(output_of, part, readers)
        scale, _ = _search(kernels, moments[tap], grid, steps, output_error)
        for name, kernel in zip(readers, kernels, strict=True):
            linears[name] = {**linears[name], "kernel": _wide(kernel, scale) * scale[:, None]}
        if maker in block:
            block[maker] = divide_norm(block[maker], scale, plus_one=norm_plus_one)
        else:
            linears[maker] = divide_outputs(linears[maker], scale)
        block[part] = linears
        scaled[tap] = divide_moments(moments[tap], scale)
    return block, scaled


@functools.partial(jax.jit, static_argnames=("grid", "steps"))
def awq_scale(
    weights: tuple[Float[Array, "in _"], ...], moments: Moments, grid: Grid, *, steps: int = 20
) -> tuple[Float[Array, " in"], Float[Array, ""]]:
    """The scale of the inputs that linears share, with the least output error of rounding to nearest.

        s_r = max(a^r, 1e-4),  s_r <- s_r / sqrt(max s_r min s_r),  r = 0, 1/steps, .., 1 - 1/steps
        minimize over r   sum_linears tr(D^T H D),   D = diag(1/s_r) Q(diag(s_r) W) - W

    a is the magnitude of an input: here its root mean square `sqrt(H_kk)`, from the moments. The paper's code
    takes the mean of |x|, which the moments do not hold; for inputs of one distribution the two differ by a
    constant, which drops out. It also compares outputs of the whole attention or MLP; `awq` does where it is
    given `apply`. r = 0 leaves the weight as it is, so the error is never above that of rounding to nearest.

    Args:
      weights: kernels `[in, out_i]`, any float dtype; computed in float32, or in float64 where one is.
      moments: of the shared inputs. Those that were always 0 count with the least magnitude of the others.
      grid: static.
      steps: exponents tried.

    Returns:
      The scale `[in]` and `sum tr(D^T H D) / sum tr(W^T H W)`.

    Raises:
      UsageError: the group size does not divide `in`, or `steps` is not positive.
    """
    return _search(weights, moments, grid, steps, None)


def divide_norm(
    weight: Float[Array, " n"], scale: Float[Array, " n"], *, plus_one: bool
) -> Float[Array, " n"]:
    """The weight of a norm with its outputs divided by `scale`; `plus_one`: it multiplies by 1 + weight."""
    weight = _wide(weight, scale)
    return (1 + weight) / scale - 1 if plus_one else weight / scale


def divide_outputs(linear: Mapping[str, Any], scale: Float[Array, " out"]) -> dict[str, Any]:
    """A linear `{"kernel": [in, out]}`, perhaps with a `"bias"`, with its outputs divided by `scale`."""
    return {name: _wide(a, scale) / scale.reshape((1,) * (a.ndim - 1) + (-1,)) for name, a in linear.items()}


def divide_moments(moments: Moments, scale: Float[Array, " n"]) -> Moments:
    """The moments of inputs that are divided by `scale`: `H <- diag(1/s) H diag(1/s)`, `max|x| / s`."""
    scale = scale.astype(moments.second.dtype)
    second = moments.second / scale[:, None] / scale[None, :]
    return dataclasses.replace(moments, second=second, max_abs=moments.max_abs / scale)


def _search(
    weights: tuple[Array, ...],
    moments: Moments,
    grid: Grid,
    steps: int,
    output_error: Callable[[Array], Array] | None,
) -> tuple[Array, Array]:
    """`awq_scale`; `output_error` maps rounded weights, side by side, to what is minimized instead."""
    if steps < 1:
        raise UsageError(f"steps={steps} is not positive; the paper's code takes 20")
    dtype = working_dtype(*(w.dtype for w in weights), moments.second.dtype)
    # The grid belongs to columns, so linears that share inputs are one wide linear.
    w = jnp.concatenate([w.astype(dtype) for w in weights], axis=1)
    h = moments.second.astype(dtype)
    magnitude = jnp.sqrt(jnp.diagonal(h) / jnp.maximum(moments.count, 1).astype(dtype))
    live = magnitude > 0
    least = jnp.min(magnitude, where=live, initial=jnp.inf)
    magnitude = jnp.where(live, magnitude, jnp.where(jnp.any(live), least, 1))

    def attempt(exponent: Array) -> tuple[Array, Array]:
        scale = jnp.maximum(magnitude**exponent, _SMALLEST_SCALE)
        scale = scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))
        rounded = grid.fake_quantize(w * scale[:, None]) / scale[:, None]
        return scale, layer_error(rounded, w, h) if output_error is None else output_error(rounded)

    scales, errors = jax.lax.map(attempt, jnp.arange(steps, dtype=dtype) / steps)
    best = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))
    return scales[best], errors[best]


def _output_error(
    apply: Callable[[Mapping[str, Any], Array], Array],
    inputs: Array,
    block_params: Mapping[str, Any],
    reference: Array,
    part: str,
    readers: tuple[str, ...],
    rounded: Array,
) -> Array:
    """Squared error of the block's output with the rounded kernels of `readers`, relative to the output's."""
    linears, start = dict(block_params[part]), 0
    for name in readers:
        width = linears[name]["kernel"].shape[1]
        linears[name] = {**linears[name], "kernel": rounded[:, start : start + width]}
        start += width
    reference = reference.astype(jnp.float32)
    error = apply({**block_params, part: linears}, inputs).astype(jnp.float32) - reference
    return (jnp.sum(jnp.square(error)) / jnp.sum(jnp.square(reference))).astype(rounded.dtype)


def _wide(a: Array, scale: Array) -> Array:
    return a.astype(scale.dtype)
