"""Rotations folded into a model: other bases for what flows in it, the same function (QuaRot, SpinQuant).

QuaRot is arXiv 2404.00456, SpinQuant arXiv 2405.16406. With norms folded into the linears behind them,

    RMSNorm(x R) = RMSNorm(x) R,    (x R)(R^T W) = x W,

so the residual stream may have any orthonormal basis. Everything is computed in float64 on the host and cast
to the dtype of the parameters; for half precision cast them up first, or each function rounds. Functions take
whole parameter trees or parts of them: only `blocks` (stacked on axis 0, perhaps one of them), or only
`embed`, `norm` and `head`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import UsageError
from jaxquant.linalg import base_order, hadamard_transform, random_hadamard, random_orthogonal
from jaxquant.models.config import LINEARS, ModelConfig

#: Norms of a block and the linears that read them.
_NORMS = {
    "attn_norm": next(paths for tap, paths in LINEARS if tap == "attn_in"),
    "mlp_norm": next(paths for tap, paths in LINEARS if tap == "mlp_in"),
}
#: Linears that write to the residual stream, with the norm that some families have in between.
_WRITERS = {"attn.o": "attn_post_norm", "mlp.down": "mlp_post_norm"}

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Rotations:
    """Orthogonal changes of basis, rows in and columns out: `x' = x R`. Float64.

    Attributes:
      residual: R1 `[d, d]`, of the residual stream, one for the whole model.
      values: R2 `[layers, kv_heads, head_dim, head_dim]`, of every value head and so of the inputs of `o`; or
        `None`.
      keys: R3 `[layers, kv_heads, head_dim, head_dim]`, of keys and queries behind the position embedding;
        or `None`. At run time.
      key_shift: `[layers, kv_heads, head_dim]`, subtracted from all keys of a head before R3; `None` is 0.
        Needs `keys`.
      hidden: int `[layers, f]`, an order of the inputs of `down`: unit `hidden[l, j]` comes to place j; or
        `None`.
      hidden_block: R4: the inputs of `down`, in their order, are multiplied by the Hadamard matrix of this
        order, a block of channels at a time, at run time; 0: they are not.
    """

    residual: np.ndarray
    values: np.ndarray | None = None
    keys: np.ndarray | None = None
    key_shift: np.ndarray | None = None
    hidden: np.ndarray | None = None
    hidden_block: int = 0


def quarot(config: ModelConfig, seed: int) -> Rotations:
    """QuaRot: randomized Hadamard matrices for the residual stream and for values and keys of each head.

    Random orthogonal matrices where no Hadamard matrix of the order is known. The inputs of `down` get the
    one Hadamard matrix of their number, or of the largest block for which there is one.
    """
    heads = config.num_layers * config.num_kv_heads
    seeds = iter(np.random.SeedSequence(seed).generate_state(1 + 2 * heads))

    def draw(n: int) -> np.ndarray:
        own = int(next(seeds))
        try:
            return random_hadamard(n, own)
        except UsageError:
            return random_orthogonal(n, own)

    def draw_heads() -> np.ndarray:
        drawn = np.array([draw(config.head_dim) for _ in range(heads)])
        return drawn.reshape(config.num_layers, config.num_kv_heads, *drawn.shape[1:])

    return Rotations(
        residual=draw(config.hidden_size),
        values=draw_heads(),
        keys=draw_heads(),
        hidden_block=largest_block(config.intermediate_size),
    )


def largest_block(n: int) -> int:
    """The largest divisor of n that is the order of a known Hadamard matrix."""
    for block in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True):
        try:
            base_order(block)
        except UsageError:
            continue
        return block
    raise AssertionError("1 is an order")


def fold_norms(params: Mapping[str, Any], config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Multiplies the scale of every norm into the linears that read it: `W <- diag(g) W`, `g <- 1`.

    g is the norm's weight, or 1 + weight (Gemma). A tied embedding is untied, since the final norm goes into
    the head. Norms over heads and those behind `o` and `down` (Gemma 3) stay. The function is preserved.
    """
    folded = dict(params)
    if "blocks" in params:
        blocks = {**params["blocks"], "attn": dict(params["blocks"]["attn"])}
        blocks["mlp"] = dict(params["blocks"]["mlp"])
        for norm, paths in _NORMS.items():
            gain = _gain(blocks[norm], config)
            for path in paths:
                part, name = path.split(".")
                kernel = blocks[part][name]["kernel"]
                scaled = _like(kernel, gain[..., :, None] * _wide(kernel))
                blocks[part][name] = {**blocks[part][name], "kernel": scaled}
            blocks[norm] = _identity(blocks[norm], config)
        folded["blocks"] = blocks
    if "norm" in params:
        head = params["head"] if "head" in params else params["embed"].T
        folded["head"] = _like(head, _gain(params["norm"], config)[:, None] * _wide(head))
        folded["norm"] = _identity(params["norm"], config)
    return folded, dataclasses.replace(config, tie_embeddings=False)


def rotate(
    params: Mapping[str, Any], config: ModelConfig, rotations: Rotations
) -> tuple[Params, ModelConfig]:
    """The same function in other bases; `fold_norms` comes first.

        E <- E R1;  W_{q,k,v,gate,up,head} <- R1^T W;  W_{o,down} <- W R1 and their biases b R1
        W_v <- W_v (I (x) R2), its bias likewise;  W_o <- (I (x) R2^T) W_o
        columns of gate and up, rows of down: reordered;  W_down <- (I (x) R4^T) W_down

    Left to the forward pass are R3, as `key_rotation` and `key_shift` of a block's attention, and R4, as
    `precision.hidden_hadamard` of the config (and of a block's MLP, to be compared with it). Every query head
    that shares a key/value head takes its R2 and R3. Where a norm stands between `o` or `down` and the
    residual stream (Gemma 3), R1 cannot be folded: the block gets `attn_post_rotation` and
    `mlp_post_rotation` `[layers, d, d]`, `diag(g) R1`, applied behind those norms at run time.

    Raises:
      UsageError: a norm is not folded, a rotation does not fit the model, or there is an R3 or R4 already.
    """
    _check(rotations, config, len(params["blocks"]["attn_norm"]) if "blocks" in params else None)
    rotated, turn = dict(params), rotations.residual
    if "blocks" in params:
        blocks = {**params["blocks"], "attn": dict(params["blocks"]["attn"])}
        blocks["mlp"] = dict(params["blocks"]["mlp"])
        for norm, paths in _NORMS.items():
            _check_folded(norm, blocks[norm], config)
            for path in paths:
                _edit(blocks, path, lambda kernel: turn.T @ kernel)
        for path, norm in _WRITERS.items():
            name = norm.replace("norm", "rotation")
            if not config.post_norms:
                _edit(blocks, path, lambda kernel: kernel @ turn, lambda bias: bias @ turn)
            elif name in blocks:
                blocks[name] = _like(blocks[name], _wide(blocks[name]) @ turn)
            else:
                gain = _gain(blocks[norm], config)
                # Every branch passes through it, so half precision would show.
                exact = blocks[norm] if blocks[norm].dtype.itemsize > 2 else blocks[norm].astype(np.float32)
                blocks[name] = _like(exact, gain[..., :, None] * turn)
                blocks[norm] = _identity(blocks[norm], config)
        if rotations.values is not None:
            _rotate_values(blocks, config, rotations.values)
        if rotations.hidden is not None:
            order = rotations.hidden
            for path in ("mlp.gate", "mlp.up"):
                _edit(
                    blocks,
                    path,
                    lambda kernel: np.take_along_axis(kernel, order[:, None], axis=-1),
                    lambda bias: np.take_along_axis(bias, order, axis=-1),
                )
            _edit(blocks, "mlp.down", lambda kernel: np.take_along_axis(kernel, order[..., None], axis=-2))
        if rotations.keys is not None:
            _add_key_rotation(blocks["attn"], rotations)
        if rotations.hidden_block:
            _edit(blocks, "mlp.down", lambda kernel: _turn_blocks(kernel, rotations.hidden_block))
            # A mark whose length is the order, so that the forward pass refuses a config with another.
            mark = np.zeros((len(blocks["attn_norm"]), rotations.hidden_block), np.int8)
            blocks["mlp"]["hidden_hadamard"] = mark
        rotated["blocks"] = blocks
    if "norm" in params:
        _check_folded("norm", params["norm"], config)
        if "head" not in params:
            raise UsageError("rotate: the embedding is tied; call fold_norms first")
        rotated["embed"] = _like(params["embed"], _wide(params["embed"]) @ turn)
        rotated["head"] = _like(params["head"], turn.T @ _wide(params["head"]))
    if rotations.hidden_block:
        precision = dataclasses.replace(config.precision, hidden_hadamard=rotations.hidden_block)
        config = dataclasses.replace(config, precision=precision)
    return rotated, config


def _add_key_rotation(attn: Params, rotations: Rotations) -> None:
    keys, shift = rotations.keys, rotations.key_shift
    assert keys is not None
    if "key_rotation" in attn:
        raise UsageError("rotate: the keys of this model are rotated already; start from the original model")
    attn["key_rotation"] = jnp.asarray(keys.astype(np.float32))
    attn["key_shift"] = jnp.asarray(
        (np.zeros(keys.shape[:-1]) if shift is None else shift).astype(np.float32)
    )


def _turn_blocks(kernel: np.ndarray, block: int) -> np.ndarray:
    """`(I (x) R4^T) W`, as the transform of the rows of `W^T`."""
    columns = np.swapaxes(kernel, -1, -2)
    with jax.enable_x64(True):
        turned = hadamard_transform(jnp.asarray(columns.reshape(*columns.shape[:-1], -1, block)))
    return np.swapaxes(np.asarray(turned).reshape(columns.shape), -1, -2)


def _rotate_values(blocks: Params, config: ModelConfig, values: np.ndarray) -> None:
    heads, kv, size = config.num_heads, config.num_kv_heads, config.head_dim

    def outputs(a: np.ndarray) -> np.ndarray:
        split = a.reshape(len(a), -1, kv, size)
        return np.einsum("lnhi,lhij->lnhj", split, values).reshape(a.shape)

    def inputs(kernel: np.ndarray) -> np.ndarray:
        split = kernel.reshape(len(kernel), kv, heads // kv, size, -1)
        return np.einsum("lhij,lhgim->lhgjm", values, split).reshape(kernel.shape)

    _edit(blocks, "attn.v", outputs, outputs)
    _edit(blocks, "attn.o", inputs)


def _edit(blocks: Params, path: str, change: Any, change_bias: Any = None) -> None:
    part, name = path.split(".")
    linear = dict(blocks[part][name])
    linear["kernel"] = _like(linear["kernel"], change(_wide(linear["kernel"])))
    if "bias" in linear and change_bias is not None:
        linear["bias"] = _like(linear["bias"], change_bias(_wide(linear["bias"])))
    blocks[part][name] = linear


def _check(rotations: Rotations, config: ModelConfig, layers: int | None) -> None:
    d, size, block = config.hidden_size, config.head_dim, rotations.hidden_block
    if (block or rotations.hidden is not None) and config.precision.hidden_hadamard:
        raise UsageError("rotate: the inputs of down are rotated already; start from the original model")
    if block and config.intermediate_size % block:
        raise UsageError(
            f"rotate: {config.intermediate_size} inputs of down do not divide into blocks of {block}"
        )
    if rotations.key_shift is not None and rotations.keys is None:
        raise UsageError("rotate: key_shift needs keys")
    shapes = {
        "residual": (d, d),
        "values": (layers, config.num_kv_heads, size, size),
        "keys": (layers, config.num_kv_heads, size, size),
        "key_shift": (layers, config.num_kv_heads, size),
        "hidden": (layers, config.intermediate_size),
    }
    for name, shape in shapes.items():
        array = getattr(rotations, name)
        if array is None or (layers is None and name != "residual"):
            continue
        if array.shape != shape:
            raise UsageError(f"rotate: {name} is {list(array.shape)}; this model takes {list(shape)}")
        if name in ("residual", "values", "keys"):
            error = np.abs(np.swapaxes(array, -1, -2) @ array - np.eye(shape[-1])).max()
            if not error <= 1e-10:
                raise UsageError(
                    f"rotate: {name} is not orthogonal (R^T R - I is {error:.1e}); build it in float64"
                )
        elif name == "hidden" and np.any(np.sort(array, axis=-1) != np.arange(shape[-1])):
            raise UsageError("rotate: hidden is no order: every unit must come once a layer")


def _check_folded(name: str, weight: Any, config: ModelConfig) -> None:
    if not np.all(_gain(weight, config) == 1):
        raise UsageError(f"rotate: {name} still scales; call fold_norms first")


def _gain(weight: Any, config: ModelConfig) -> np.ndarray:
    return _wide(weight) + (1 if config.norm_plus_one else 0)


def _identity(weight: Any, config: ModelConfig) -> Any:
    return _like(weight, np.full(weight.shape, 0 if config.norm_plus_one else 1))


def _wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _like(leaf: Any, values: np.ndarray) -> Any:
    values = values.astype(leaf.dtype)
    return values if isinstance(leaf, np.ndarray) else jnp.asarray(values)
