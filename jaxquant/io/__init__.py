"""Reading and writing models: Hugging Face directories, GGUF files, known names, quantized checkpoints."""

from jaxquant.io.checkpoint import load_checkpoint
from jaxquant.io.model import LoadedModel, load_model
from jaxquant.io.source import Source, load_params, open_model

__all__ = ["LoadedModel", "Source", "load_checkpoint", "load_model", "load_params", "open_model"]
