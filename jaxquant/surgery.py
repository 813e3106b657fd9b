"""Rotated models as a `Source`: blocks are rotated while they are read, so no model need fit in memory."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant.io import checkpoint
from jaxquant.io.source import Source
from jaxquant.methods.rotate import Rotations, fold_norms, rotate
from jaxquant.models.config import ModelConfig

_PER_LAYER = ("values", "keys", "key_shift", "hidden")


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

    def outer(self) -> dict[str, Any]:
        """Parameters outside the blocks, float32."""
        return self._turn(self.source.outer(), self.rotations)

    def _turn(self, params: dict[str, Any], rotations: Rotations | None) -> dict[str, Any]:
        wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
        turned, config = fold_norms(wide, self.source.config)
        if rotations is not None:
            turned, _ = rotate(turned, config, rotations)
        return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), turned)


def stored_rotations(path: Path, make: Callable[[], Rotations]) -> Rotations:
    """The rotations in the file `path`; those that `make` returns are put there first where it is missing.

    So a run that goes on finds the same basis.
    """
    if not path.is_file():
        rotations = make()
        fields = {field.name: getattr(rotations, field.name) for field in dataclasses.fields(rotations)}
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in fields.items() if value is not None})
        checkpoint.write_bytes(path, buffer.getvalue())
    with np.load(path) as stored:
        fields = dict(stored)
    return Rotations(**{**fields, "hidden_block": int(fields["hidden_block"])})  # pyright: ignore[reportArgumentType]
