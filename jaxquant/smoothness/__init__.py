"""How strongly a model's predictions react to its inputs, and how far quantization changes that (FINE)."""

from jaxquant.smoothness.measure import GradientComparison, compare_gradients, gradient_comparison
from jaxquant.smoothness.proxy import (
    fisher_trace,
    input_gradient,
    layer_gradient_norms,
    local_lipschitz,
    token_kl,
)

__all__ = [
    "GradientComparison",
    "compare_gradients",
    "fisher_trace",
    "gradient_comparison",
    "input_gradient",
    "layer_gradient_norms",
    "local_lipschitz",
    "token_kl",
]
