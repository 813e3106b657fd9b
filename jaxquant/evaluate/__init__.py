"""What a model is worth: perplexity, divergence from a reference, tasks, generated text."""

from jaxquant.evaluate.divergence import Divergence, divergence
from jaxquant.evaluate.generate import generate, generate_batch
from jaxquant.evaluate.perplexity import Perplexity, perplexity
from jaxquant.evaluate.task_data import load_items
from jaxquant.evaluate.tasks import TaskResult, evaluate_task

__all__ = [
    "Divergence",
    "Perplexity",
    "TaskResult",
    "divergence",
    "evaluate_task",
    "generate",
    "generate_batch",
    "load_items",
    "perplexity",
]
