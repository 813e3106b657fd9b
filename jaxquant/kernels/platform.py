"""Operations with another implementation on some platforms: what they have in common but for their values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxquant.errors import UsageError

#: Who computes an operation: the portable implementation, or the kernel of the platform.
Backend: TypeAlias = Literal["portable", "kernel"]

#: A context that chooses for all operations inside: `with use_backend("portable"): ...`; `"kernel"` are the
#: kernels where there are some. Programs that were compiled under another choice are not used.
use_backend: Any = jax.make_user_context(None)

# Platforms whose calls `jax.export` rejects: nothing vouches for them on the machine that will run them.
_NOT_EXPORTED = {"cpu": "CPUs", "cuda": "GPUs"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation for one platform.

    Attributes:
      call: the signature of the portable implementation.
      refuses: why it does not take arrays of these shapes and dtypes, of which it is given the avals and the
        keywords; "" where it does.
      lacks: why it does not run on a device of its platform; "" where it does. Where a program is lowered for
        devices that are not named (`lowering_platforms=`), such a kernel has to be asked for. `None`: it runs
        on all.
    """

    call: Callable[..., Any]
    refuses: Callable[..., str]
    lacks: Callable[[Any], str] | None = None


def check_backend(backend: str | None) -> None:
    """UsageError for one that is not there."""
    known = get_args(Backend)
    if backend not in (None, *known):
        raise UsageError(f"unknown backend {backend!r}; use {' or '.join(known)}, or leave it out")


def by_platform(
    portable: Callable[..., Any], kernels: Mapping[str, Sequence[Kernel]], *, rows: int
) -> Callable[..., Any]:
    """`portable(*arrays, **layout)`, computed by a kernel where one takes the arrays.

    It is a primitive, since no device is asked while tracing: the choice is made where a program is lowered.
    In all but its value it is `portable`: derivatives of any order (but no `jax.linear_transpose`), programs
    for several devices that XLA divides by itself (inside `jax.shard_map` kernels run), and `jax.export` for
    CPUs and GPUs, whose kernels are not part of a program. `jax.vmap` over the first `rows` arrays makes more
    rows of one call, over others, or where it would copy more of these than it is given, it loops.

    Args:
      portable: returns an array or a tuple of them; its name is that of the primitive.
      kernels: by platform, `"cpu"`, `"tpu"`, `"cuda"`; the first one that takes the arrays and runs on the
        device is used.
      rows: the number of leading arrays whose first axis is rows of every result.

    Returns:
      The function, with another keyword `backend`: `"portable"` spares the kernels, `"kernel"` raises
      UsageError where there is none. `None`: as `use_backend` says, else the kernel where there is one.
    """
    primitive = Primitive(f"{portable.__name__}_by_platform")
    primitive.multiple_results = True

    def bind(*arrays: Array, backend: Backend | None = None, **layout: Any) -> Any:
        chosen = use_backend.value if backend is None else backend
        check_backend(chosen)
        if chosen == "portable":
            return jitted(**layout)(*arrays)
        results = again(*arrays, asked=chosen == "kernel", strict=backend == "kernel", **layout)
        return results[0] if len(results) == 1 else tuple(results)

    # Else calls outside of `jit` would compile its loops every time, and, inlined, those of its gradient.
    @functools.cache
    def jitted(**layout: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(portable, **layout))

    def again(*arrays: Array, **params: Any) -> list[Array]:
        return primitive.bind(*varying_alike(*arrays), **params)

    def shape(*avals: Any, asked: bool, strict: bool, **layout: Any) -> Any:
        # On a mesh of explicit axes what comes out is laid out as the portable implementation has it.
        inputs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in avals]
        results = jax.tree.leaves(jax.eval_shape(functools.partial(portable, **layout), *inputs))
        return [
            avals[0].update(shape=a.shape, dtype=a.dtype, weak_type=False, sharding=a.sharding)
            for a in results
        ]

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], **params: Any) -> Any:
        layout = {key: value for key, value in params.items() if key not in ("asked", "strict")}
        moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
        moving = [i for i in moving if jnp.issubdtype(primals[i].dtype, jnp.floating)]

        def of_moving(*values: Array) -> list[Array]:
            arrays = list(primals)
            for i, value in zip(moving, values, strict=True):
                arrays[i] = value
            return jax.tree.leaves(jitted(**layout)(*arrays))

        results = again(*primals, **params)
        _, moved = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
        # Integers do not move: `jax.jvp` says so with a dtype, a rule with a symbol.
        return results, [
            ad.Zero(jax.typeof(y).to_tangent_aval()) if tangent.dtype == jax.dtypes.float0 else tangent
            for y, tangent in zip(results, moved, strict=True)
        ]

    def batch(
        arrays: tuple[Array, ...], axes: tuple[int | None, ...], **params: Any
    ) -> tuple[list[Array], list[int]]:
        size = next(a.shape[i] for a, i in zip(arrays, axes, strict=True) if i is not None)
        front = [a if i is None else jnp.moveaxis(a, i, 0) for a, i in zip(arrays, axes, strict=True)]
        alone, mapped = (
            sum(a.size for a, i in zip(front[:rows], axes[:rows], strict=True) if (i is None) == out)
            for out in (True, False)
        )
        if all(axis is None for axis in axes[rows:]) and alone <= mapped:
            own = [
                a if axis is not None else jnp.broadcast_to(a, (size, *a.shape))
                for a, axis in zip(front[:rows], axes[:rows], strict=True)
            ]
            count = own[0].shape[1]
            results = again(
                *(a.reshape(size * a.shape[1], *a.shape[2:]) for a in own), *front[rows:], **params
            )
            return [y.reshape(size, count, *y.shape[1:]) for y in results], [0] * len(results)
        stacked = [a for a, axis in zip(front, axes, strict=True) if axis is not None]

        def one(slices: list[Array]) -> list[Array]:
            left = iter(slices)
            return again(
                *(a if axis is None else next(left) for a, axis in zip(front, axes, strict=True)), **params
            )

        results = jax.lax.map(one, stacked)
        return results, [0] * len(results)

    def lower(platform: str | None) -> Callable[..., Any]:
        lower_portable = _lower(portable)
        candidates = [(kernel, _lower(kernel.call)) for kernel in kernels.get(platform or "", ())]

        def rule(
            context: mlir.LoweringRuleContext, *operands: Any, asked: bool, strict: bool, **layout: Any
        ) -> Any:
            module, reasons = context.module_context, []
            for kernel, lower_kernel in candidates:
                reason = (
                    _cannot_hold_calls(module, platform)
                    or _symbolic(context.avals_in)
                    or kernel.refuses(*context.avals_in, **layout)
                    or _unfit(kernel, module, platform, asked=asked)
                )
                if not reason:
                    # Kernels count in int32, whatever the program around them does.
                    with jax.enable_x64(False):
                        return lower_kernel(context, *operands, **layout)
                reasons.append(reason)
            if strict:
                why = " and ".join(dict.fromkeys(reasons)) or "there is none for this platform"
                raise UsageError(f"{portable.__name__}: no kernel, since {why}; use backend='portable'")
            return lower_portable(context, *operands, **layout)

        return rule

    @functools.cache
    def compiled(**params: Any) -> Callable[..., list[Array]]:
        return jax.jit(functools.partial(again, **params))

    def run(*arrays: Array, **params: Any) -> list[Array]:
        with jax.disable_jit(False):  # there is nothing to run step by step
            return compiled(**params)(*arrays)

    primitive.def_impl(run)
    primitive.def_abstract_eval(shape)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower(None))
    for platform in kernels:
        mlir.register_lowering(primitive, lower(platform), platform=platform)
    return bind


def varying_alike(*arrays: Array) -> list[Array]:
    """The arrays, all varying over the axes of a `shard_map` that one of them varies over."""
    axes = [jax.typeof(a).mat.varying for a in arrays]
    union = frozenset().union(*axes)
    return [
        a if own == union else jax.lax.pcast(a, tuple(union - own), to="varying")
        for a, own in zip(arrays, axes, strict=True)
    ]


def _lower(f: Callable[..., Any]) -> Callable[..., Any]:
    return mlir.lower_fun(lambda *arrays, **layout: jax.tree.leaves(f(*arrays, **layout)))


def _cannot_hold_calls(module: Any, platform: str | None) -> str:
    if platform in _NOT_EXPORTED and module.lowering_parameters.for_export:
        return f"an exported program cannot hold a kernel for {_NOT_EXPORTED[platform]}"
    context = module.axis_context
    names = getattr(context, "manual_axes", None)
    if names is None:
        divided = getattr(context, "num_devices", 1) not in (1, None)
    else:
        divided = names != frozenset(context.mesh.axis_names)
    return "XLA does not divide a call: run it inside jax.shard_map" if divided else ""


def _symbolic(avals: Any) -> str:
    sizes = (size for aval in avals for size in aval.shape)
    return "" if all(isinstance(size, int) for size in sizes) else "shapes are symbolic"


def _unfit(kernel: Kernel, module: Any, platform: str | None, *, asked: bool) -> str:
    if kernel.lacks is None:
        return ""
    # In cross-lowering the backend is the one at hand, of another platform. JAX calls that of CUDA "gpu".
    own = "gpu" if platform == "cuda" else platform
    devices = [d for d in module.backend.devices() if d.platform == own] if module.backend else []
    if not devices:
        return "" if asked else "the device is not known"
    return next(filter(None, map(kernel.lacks, devices)), "")
