"""The CPU implementation for some hundred rows: `cpu.cc`, called by XLA; where it cannot be built, `scan`.

A primitive, since it is its lowering that depends on the platform: tracing builds nothing and asks for no
device, and a program lowered for TPU or GPU holds the portable implementation.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.dequant_matmul import scan

#: Rows of x up to which unpacking the words for every eight of them costs less than `scan` (by measurement).
LARGEST_ROWS = 256
_TARGET = "jaxquant_dequant_matmul"


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt8[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`y = sum_g scale_g * (x_g @ code_g - zero_g * sum(x_g))` in float32, in the dtype of `x`.

    Shapes as in `reference`; `x` is float32 or bfloat16, `scale` and `zero` both float16 or both float32. In
    all but its value it is `scan.dequant_matmul`: derivatives of any order, `vmap` over weights, lowering for
    another platform or for several devices.
    """
    return _dequant_matmul.bind(x, words, scale, zero, bits=bits, block=block)


def takes(x: Array, words: Array, scale: Array, zero: Array) -> bool:
    """Whether the kernel knows these dtypes."""
    return (
        x.dtype in (jnp.float32, jnp.bfloat16)
        and words.dtype == jnp.uint8
        and scale.dtype == zero.dtype
        and scale.dtype in (jnp.float16, jnp.float32)
    )


def available() -> bool:
    """Whether the kernel is built, now if need be; never where `JAXQUANT_NATIVE=0`."""
    return os.environ.get("JAXQUANT_NATIVE") != "0" and _registered()


@functools.cache
def _registered() -> bool:
    library = native.load(Path(__file__).with_suffix(".cc"))
    if library is None:
        return False
    capsule = jax.ffi.pycapsule(library.JaxquantDequantMatmul)
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")
    return True


_dequant_matmul = Primitive("dequant_matmul")
_dequant_matmul.def_impl(jax.jit(dequant_matmul, static_argnames=("bits", "block")))


@_dequant_matmul.def_abstract_eval
def _shape(x: Any, words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> Any:
    return x.update(shape=(x.shape[0], words.shape[2]), weak_type=False)


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], **layout: int) -> tuple[Array, Array]:
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero and i != 1]

    def of_moving(*values: Array) -> Array:
        arguments = list(primals)
        for i, value in zip(moving, values, strict=True):
            arguments[i] = value
        return scan.dequant_matmul(*arguments, **layout)

    _, tangent = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
    return _dequant_matmul.bind(*primals, **layout), tangent


def _batch(arguments: tuple[Array, ...], axes: tuple[int | None, ...], **layout: int) -> tuple[Array, int]:
    x, *weight = arguments
    if any(axis is not None for axis in axes[1:]):
        return jax.vmap(functools.partial(scan.dequant_matmul, **layout), axes)(*arguments), 0
    stacked = jnp.moveaxis(x, axes[0], 0)  # pyright: ignore[reportArgumentType]  some axis is batched
    rows = stacked.reshape(-1, stacked.shape[-1])
    implementation = dequant_matmul if len(rows) <= LARGEST_ROWS else scan.dequant_matmul
    return implementation(rows, *weight, **layout).reshape(*stacked.shape[:-1], -1), 0


def _call(x: Array, words: Array, scale: Array, zero: Array, *, bits: int, block: int) -> Array:
    y = jax.ShapeDtypeStruct((x.shape[0], words.shape[2]), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, y)
    return call(x.astype(jnp.float32), words, scale, zero, bits=bits).astype(x.dtype)


_lower_scan = mlir.lower_fun(scan.dequant_matmul, multiple_results=False)
_lower_call = mlir.lower_fun(_call, multiple_results=False)


def _lower_for_cpu(context: mlir.LoweringRuleContext, *operands: Any, **layout: int) -> Any:
    # The partitioner cannot divide a call and would gather the weight.
    one_device = getattr(context.module_context.axis_context, "num_devices", None) == 1
    lower = _lower_call if one_device and available() else _lower_scan
    return lower(context, *operands, **layout)


ad.primitive_jvps[_dequant_matmul] = _jvp
batching.primitive_batchers[_dequant_matmul] = _batch
mlir.register_lowering(_dequant_matmul, _lower_scan)
mlir.register_lowering(_dequant_matmul, _lower_for_cpu, platform="cpu")
