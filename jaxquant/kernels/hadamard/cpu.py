"""The CPU implementation: `cpu.cc`, built on first use and called by XLA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.platform import Kernel
from jaxquant.linalg import base_order, hadamard

if TYPE_CHECKING:
    from jaxquant.quant import ActivationGrid

# Channels of the widest vector; groups, and what doubling adds to a block, have to be whole ones.
_LANES = 16
_TARGET = "jaxquant_hadamard_quantize"


def hadamard_quantize(
    x: Float[Array, "rows n"], *, grid: ActivationGrid, block: int
) -> tuple[UInt8[Array, "rows n"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """As `reference`, in float32; x is float32, bfloat16 or float16.

    A group with NaN or infinity has NaN for its scale and lo.
    """
    per_group = jax.ShapeDtypeStruct((x.shape[0], grid.groups(x.shape[1])), jnp.float32)
    results = (jax.ShapeDtypeStruct(x.shape, jnp.uint8), per_group, per_group)
    codes, scale, lo = jax.ffi.ffi_call(_TARGET, results)(
        x, jnp.asarray(hadamard(base_order(block)), jnp.float32),
        block=block, bits=grid.bits, symmetric=int(grid.symmetric), zero=int(grid.range == "zero"),
        half=int(grid.scale_dtype == "float16"), clip=np.float32(grid.clip),
    )  # fmt: skip
    return codes, scale, lo


def _refuses(x: Any, *, grid: ActivationGrid, block: int) -> str:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    m, group = base_order(block), x.shape[1] // grid.groups(x.shape[1])
    if block // m % _LANES or group % _LANES:
        return (
            f"blocks of {block} = {m} x {block // m} channels and groups of {group} do not fill vectors of "
            f"{_LANES}"
        )
    return native.missing(Path(__file__).with_suffix(".cc"), ((_TARGET, "JaxquantHadamardQuantize"),))


KERNEL = Kernel(hadamard_quantize, _refuses)
