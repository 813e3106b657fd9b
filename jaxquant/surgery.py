"""Surgeries, the stages that rotate a model, and the rotated model as a `Source`.

Blocks are rotated while they are read, so no model need fit in memory.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from jaxquant.calibrate.offsets import offsets
from jaxquant.errors import UsageError
from jaxquant.io import checkpoint
from jaxquant.io.source import Source
from jaxquant.methods.offq import Basis, check_groups, offq
from jaxquant.methods.rotate import Rotations, fold_norms, largest_block, quarot, rotate
from jaxquant.models.config import ModelConfig
from jaxquant.stages import Stage, register

_PER_LAYER = ("values", "keys", "key_shift", "hidden")


class Surgery(Stage):
    """Puts a model into other bases before any of it is calibrated; see `methods.rotate`."""

    def hidden_block(self, config: ModelConfig) -> int:
        """Order of the Hadamard matrix on the inputs of `down` at run time; 0: none.

        Raises:
          UsageError: the stage does not suit the model.
        """
        raise NotImplementedError

    def rotations(self, source: Source, tokens: np.ndarray) -> Rotations:
        """The bases; `source` has its norms folded, `tokens` are the calibration windows."""
        raise NotImplementedError


@register("quarot")
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuaRot(Surgery):
    """Randomized Hadamard matrices; see `methods.rotate.quarot`."""

    seed: int = 0

    def hidden_block(self, config: ModelConfig) -> int:
        """All inputs at once where there is such a matrix."""
        return largest_block(config.intermediate_size)

    def rotations(self, source: Source, tokens: np.ndarray) -> Rotations:
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

    def rotations(self, source: Source, tokens: np.ndarray) -> Rotations:
        """See `methods.offq.offq`; what it needs is collected from `tokens`."""
        return offq(offsets(source, tokens), self.group_size, basis=self.basis, sort=self.sort)

    def __str__(self) -> str:
        return f"OffQ (g{self.group_size}, {self.basis} basis{'' if self.sort else ', unsorted'})"


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
        return RotatedSource(source, config, surgery.rotations(folded, tokens))
    if not keep.is_file():
        rotations = surgery.rotations(folded, tokens)
        fields = {field.name: getattr(rotations, field.name) for field in dataclasses.fields(rotations)}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in fields.items() if value is not None})
        checkpoint.write_bytes(keep, buffer.getvalue())
    with np.load(keep) as stored:
        fields: dict[str, Any] = dict(stored)
    return RotatedSource(source, config, Rotations(**{**fields, "hidden_block": int(fields["hidden_block"])}))
