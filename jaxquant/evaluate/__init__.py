"""What a model is worth: perplexity, divergence from a reference, generated text."""

from jaxquant.evaluate.divergence import Divergence, divergence
from jaxquant.evaluate.generate import generate
from jaxquant.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Divergence", "Perplexity", "divergence", "generate", "perplexity"]
