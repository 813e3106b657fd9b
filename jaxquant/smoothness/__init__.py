"""How strongly a model's predictions react to its inputs, and how far quantization changes that (FINE)."""

from jaxquant.smoothness.comparison import (
    Estimate,
    SmoothnessComparison,
    candidate_estimates,
    smoothness_comparison,
)
from jaxquant.smoothness.measure import GradientComparison, compare_gradients, gradient_comparison
from jaxquant.smoothness.neighborhood import (
    ball,
    candidates,
    continuations,
    effective_numbers,
    jaccard,
    nearest_tokens,
    retention,
    substituted,
    substitutions,
    union,
)
from jaxquant.smoothness.proxy import (
    fisher_trace,
    input_gradient,
    layer_gradient_norms,
    local_lipschitz,
    token_kl,
)
from jaxquant.smoothness.tree import (
    Tree,
    decoding_tree,
    rescore,
    shared_nodes,
    sparsity,
    tree_retention,
)

__all__ = [
    "Estimate",
    "GradientComparison",
    "SmoothnessComparison",
    "Tree",
    "ball",
    "candidate_estimates",
    "candidates",
    "compare_gradients",
    "continuations",
    "decoding_tree",
    "effective_numbers",
    "fisher_trace",
    "gradient_comparison",
    "input_gradient",
    "jaccard",
    "layer_gradient_norms",
    "local_lipschitz",
    "nearest_tokens",
    "rescore",
    "retention",
    "shared_nodes",
    "smoothness_comparison",
    "sparsity",
    "substituted",
    "substitutions",
    "token_kl",
    "tree_retention",
    "union",
]
