"""Surgeries, the stages that rotate a model, and the rotated model as a `Source`.

Blocks are rotated while they are read, so no model need fit in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxquant.calibrate.offsets import offsets
from jaxquant.errors import UsageError
from jaxquant.evaluate.scoring import head_only, next_token_nll, over_tokens
from jaxquant.io import checkpoint
from jaxquant.io.source import Source, load_params
from jaxquant.kinds import Stage, register
from jaxquant.methods.offq import Basis, check_groups, offq
from jaxquant.methods.rotate import Rotations, fold_norms, largest_block, quarot, rotate
from jaxquant.methods.spin import Turns, spin, turn_blocks
from jaxquant.models.config import EXACT, ModelConfig
from jaxquant.models.decoder import final_hidden

_PER_LAYER = ("values", "keys", "key_shift", "hidden")


class Surgery(Stage):
    """Puts a model into other bases before any of it is calibrated; see `methods.rotate`."""

    def hidden_block(self, config: ModelConfig) -> int:
        """Order of the Hadamard matrix on the inputs of `down` at run time; 0: none.

        Raises:
          UsageError: the stage does not suit the model.
        """
        raise NotImplementedError

    def rotations(self, source: Source, config: ModelConfig, tokens: np.ndarray) -> Rotations:
        """The bases; `source` has its norms folded, `config` is that of the result, with its precision.

        `tokens` are the calibration windows, int32 `[samples, seqlen]`.
        """
        raise NotImplementedError


@register("quarot")
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuaRot(Surgery):
    """Randomized Hadamard matrices; see `methods.rotate.quarot`."""

    seed: int = 0

    def hidden_block(self, config: ModelConfig) -> int:
        """All inputs at once where there is such a matrix."""
        return largest_block(config.intermediate_size)

    def rotations(self, source: Source, config: ModelConfig, tokens: np.ndarray) -> Rotations:
        """See `methods.rotate.quarot`."""
        return quarot(source.config, self.seed)

    def __str__(self) -> str:
        return f"QuaRot (seed {self.seed})"


@register("offq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OffQ(Surgery):
    """Outlier directions turned into offsets of groups; options as in `methods.offq.offq`."""

    group_size: int = 64
    basis: Basis = "mixed"
    sort: bool = True

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"OffQ: group_size={self.group_size} must be positive; 64 or 128 is usual")
        if self.basis not in get_args(Basis):
            raise UsageError(f"unknown basis {self.basis!r}; use {', '.join(get_args(Basis))}")

    def hidden_block(self, config: ModelConfig) -> int:
        """A group.

        Raises:
          UsageError: the group size does not divide the channels, or a Hadamard matrix is missing.
        """
        check_groups(
            self.group_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            head_dim=config.head_dim,
        )
        return self.group_size

    def rotations(self, source: Source, config: ModelConfig, tokens: np.ndarray) -> Rotations:
        """See `methods.offq.offq`; what it needs is collected from `tokens`."""
        return offq(offsets(source, tokens), self.group_size, basis=self.basis, sort=self.sort)

    def __str__(self) -> str:
        return f"OffQ (g{self.group_size}, {self.basis} basis{'' if self.sort else ', unsorted'})"


@register("spinquant")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpinQuant(Surgery):
    """QuaRot's matrices, those of the residual stream and of values then learned; see `methods.spin`.

    A step takes the mean loss of next tokens on one calibration window, activations and cache as the recipe's
    precision quantizes them, weights in floating point; the rate falls to 0 in equal steps. Where precision
    quantizes nothing, no basis is better than another and QuaRot's stay. All blocks are in memory, and twice
    more their bytes while the gradient is found.

    Attributes:
      seed: of QuaRot's matrices, and of the order in which windows come again and again.
      steps: of gradient descent with momentum .9.
      learning_rate: of the first step.
    """

    seed: int = 0
    steps: int = 100
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"SpinQuant: steps={self.steps} and learning_rate={self.learning_rate} must be positive"
            )

    def hidden_block(self, config: ModelConfig) -> int:
        """That of QuaRot.

        Raises:
          UsageError: a family with norms behind `o` and `down`, where R1 is an operation and no weight.
        """
        if config.post_norms:
            raise UsageError(
                f"SpinQuant: {config.family} has norms behind o and down, into which no learned rotation can "
                "be folded; use quarot or offq"
            )
        return largest_block(config.intermediate_size)

    def rotations(self, source: Source, config: ModelConfig, tokens: np.ndarray) -> Rotations:
        """See `methods.spin.spin`; the matrices are learned from `tokens`.

        Raises:
          NonFiniteError: the loss or its gradient is not finite; names the step.
        """
        import optax

        def rate(step: ArrayLike) -> jax.Array:
            return self.learning_rate * (1 - jnp.asarray(step, jnp.float32) / self.steps)

        start = quarot(source.config, self.seed)
        if dataclasses.replace(config.precision, hidden_hadamard=0) == EXACT:
            return start
        params = load_params(RotatedSource(source, config, start))
        order = np.random.default_rng(self.seed).permutation(len(tokens))
        windows = (jnp.asarray(tokens[order[step % len(order)]]) for step in range(self.steps))
        # What is learned comes behind QuaRot's matrices, whose products stay in float64.
        learned = spin(
            functools.partial(_loss, config),
            {name: _identities(getattr(start, name)) for name in ("residual", "values")},
            ((params, window) for window in windows),
            optax.sgd(rate, momentum=0.9),
        )
        return dataclasses.replace(
            start, **{name: getattr(start, name) @ turn for name, turn in learned.items()}
        )

    def __str__(self) -> str:
        return f"SpinQuant ({self.steps} steps of {self.learning_rate:g}, seed {self.seed})"


def _identities(like: np.ndarray) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=jnp.float32), like.shape)


def _loss(config: ModelConfig, turns: Turns, data: tuple[Any, jax.Array]) -> jax.Array:
    """Mean loss of the next tokens of a window `[T]`, the model's parameters turned."""
    params, window = data
    residual = turns["residual"]
    # Turned are the rows of the embedding that are read, and what the head reads instead of the head.
    rows = jnp.matmul(jnp.take(params["embed"], window, axis=0), residual, precision="highest")
    turned = {"embed": rows, "norm": params["norm"], "blocks": turn_blocks(params["blocks"], turns)}
    hidden, _ = final_hidden(turned, config, jnp.arange(len(window))[None])
    hidden = jnp.matmul(hidden[0, :-1], residual.T.astype(hidden.dtype), precision="highest")
    score = functools.partial(next_token_nll, head_only(params, config), config)
    return jnp.mean(over_tokens(score, config.vocab_size, hidden, window[1:]))


class RotatedSource:
    """`source` with its norms folded and, with `rotations`, rotated; `config` is that of the result."""

    def __init__(self, source: Source, config: ModelConfig, rotations: Rotations | None = None):
        self.source, self.rotations, self.config = source, rotations, config
        self.name, self.chat_template = source.name, source.chat_template

    def fingerprint(self) -> str:
        """That of the original."""
        return self.source.fingerprint()

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.source.tokenizer()

    def block(self, index: int) -> dict[str, Any]:
        """Parameters of block `index`, float32."""
        own = self.rotations
        if own is not None:
            layer = {n: getattr(own, n)[index : index + 1] for n in _PER_LAYER if getattr(own, n) is not None}
            own = dataclasses.replace(own, **layer)
        params = {"blocks": jax.tree.map(lambda leaf: np.asarray(leaf)[None], self.source.block(index))}
        return jax.tree.map(lambda leaf: leaf[0], self._turn(params, own)["blocks"])

    def unrotated(self, hidden: np.ndarray) -> tuple[RotatedSource, np.ndarray]:
        """The model with its norms folded only, and what `hidden` `[..., d]` of this one is there."""
        config = dataclasses.replace(self.source.config, tie_embeddings=False)
        turned = hidden if self.rotations is None else hidden @ self.rotations.residual.T.astype(hidden.dtype)
        return RotatedSource(self.source, config), turned

    def outer(self) -> dict[str, Any]:
        """Parameters outside the blocks, float32."""
        return self._turn(self.source.outer(), self.rotations)

    def _turn(self, params: dict[str, Any], rotations: Rotations | None) -> dict[str, Any]:
        wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
        turned, config = fold_norms(wide, self.source.config)
        if rotations is not None:
            turned, _ = rotate(turned, config, rotations)
        return jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float32 if leaf.dtype.kind == "f" else leaf.dtype), turned
        )


def operate(
    source: Source, surgery: Surgery, config: ModelConfig, tokens: np.ndarray, *, keep: Path | None = None
) -> RotatedSource:
    """`source` after `surgery`.

    Args:
      source: the original model.
      surgery: what to do.
      config: of the result, see `Recipe.runtime`.
      tokens: calibration windows, int32 `[samples, seqlen]`.
      keep: a file for the bases; where it exists they are read from it, so that a run that goes on finds the
        same.
    """
    folded = RotatedSource(source, dataclasses.replace(source.config, tie_embeddings=False))
    if keep is None:
        return RotatedSource(source, config, surgery.rotations(folded, config, tokens))
    if not keep.is_file():
        rotations = surgery.rotations(folded, config, tokens)
        fields = {field.name: getattr(rotations, field.name) for field in dataclasses.fields(rotations)}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in fields.items() if value is not None})
        checkpoint.write_bytes(keep, buffer.getvalue())
    with np.load(keep) as stored:
        fields: dict[str, Any] = dict(stored)
    return RotatedSource(source, config, Rotations(**{**fields, "hidden_block": int(fields["hidden_block"])}))
