"""`load_model`: any model, original or quantized, ready to run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxquant.errors import InputError
from jaxquant.io import checkpoint
from jaxquant.io.source import load_params, open_model
from jaxquant.models.config import ModelConfig
from jaxquant.quant import paired_on_tpus

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """Parameters on the device, the static config, and the tokenizer."""

    name: str
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: tokenizers.Tokenizer

    def to_run(self) -> LoadedModel:
        """The model as its device runs it best, not to be trained or saved: on TPUs `quant.paired`."""
        return dataclasses.replace(self, params=paired_on_tpus(self.params))


def load_model(spec: str) -> LoadedModel:
    """The model that `spec` names: a folder written by `quantize_model`, or whatever `open_model` takes.

    Raises:
      InputError: the files are missing, unfinished or damaged.
      UsageError: `spec` names no model.
    """
    folder = Path(spec).expanduser()
    if not checkpoint.is_checkpoint(folder):
        source = open_model(spec)
        return LoadedModel(
            name=source.name, params=load_params(source), config=source.config, tokenizer=source.tokenizer()
        )
    import tokenizers

    params, config = checkpoint.load_checkpoint(folder)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise InputError(
            f"{folder / 'tokenizer.json'} cannot be read ({error}); copy it from the original model"
        ) from error
    return LoadedModel(name=str(spec), params=params, config=config, tokenizer=tokenizer)
