"""Decoder-only models: `config` (static), `families`, `decoder`, `cache`, `init`, `modules` (Flax NNX)."""

from jaxquant.models.config import ModelConfig, Precision, Rope

__all__ = ["ModelConfig", "Precision", "Rope"]
