"""One paper, one file: pure functions on arrays."""

from jaxquant.methods.gptq import gptq
from jaxquant.methods.problem import Problem
from jaxquant.methods.rounded import Rounded, Stats, layer_error
from jaxquant.methods.rtn import rtn

__all__ = ["Problem", "Rounded", "Stats", "gptq", "layer_error", "rtn"]
