"""Reading models: Hugging Face directories, GGUF files and models known by name."""

from jaxquant.io.source import Source, load_params, open_model

__all__ = ["Source", "load_params", "open_model"]
