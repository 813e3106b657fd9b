"""lm-evaluation-harness on any jaxquant model; needs the package lm_eval (`pip install "jaxquant[lm-eval]"`).

from lm_eval import simple_evaluate
from jaxquant.evaluate.lm_eval import JaxquantLM

simple_evaluate(JaxquantLM("q4"), tasks=["arc_easy"])
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jaxquant.calibrate.text import token_ids
from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate.continuations import encode_pair, score_continuations, start_token
from jaxquant.evaluate.tasks import generate_until
from jaxquant.io import LoadedModel, load_model

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise InputError(
        f'the adapter needs the package lm_eval ({error}); pip install "jaxquant[lm-eval]", or use '
        "jaxquant.evaluate.tasks"
    ) from None

# What its own models generate where a task does not say.
_MAX_TOKENS = 256


class JaxquantLM(LM):
    """A model for `lm_eval.simple_evaluate`; same tokens and sums as its own backend for Hugging Face models.

    Requests are its `Instance` objects, answered in their order.
    """

    def __init__(self, model: LoadedModel | str):
        """Takes a loaded model, or what `load_model` takes."""
        super().__init__()
        self.model = (load_model(model) if isinstance(model, str) else model).to_run()

    @property
    def tokenizer_name(self) -> str:
        """What keeps cached requests of different models apart."""
        return self.model.name

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)`: the log-likelihood, and whether greedy decoding gives it."""
        model = self.model
        pairs = [encode_pair(model.tokenizer, model.config, *request.args) for request in requests]
        found = score_continuations(model.params, model.config, pairs)
        return [(one.log_likelihood, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each text: the log-likelihood of all its tokens, in windows as long as the model's context."""
        model, pairs, owners = self.model, [], []
        start = start_token(model.config)
        first = [start] if model.config.add_bos else []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=first + token_ids(request.args[0], model.tokenizer, model.config).tolist(),
                prefix_token=start,
                max_seq_len=model.config.max_position,
                context_len=1,
            )
            pairs += map(make_disjoint_window, windows)
            owners += [owner] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, score_continuations(model.params, model.config, pairs), strict=True):
            totals[owner] += one.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each `(context, options)`: the greedy continuation, cut before any of the texts `until`.

        Raises:
          UsageError: the options ask for sampling or for beams.
        """
        model, alike = self.model, defaultdict(list)
        for index, request in enumerate(requests):
            alike[_greedy(request.args[1])].append(index)
        texts = [""] * len(requests)
        for (stops, limit), indices in alike.items():
            contexts = [requests[i].args[0] for i in indices]
            found = generate_until(
                model.params, model.config, model.tokenizer, contexts, stops, max_tokens=limit
            )
            for i, text in zip(indices, found, strict=True):
                texts[i] = text
        return texts


def _greedy(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """The stops and the number of tokens that a task asks for."""
    if (options.get("do_sample") and options.get("temperature", 1.0) > 0) or options.get("num_beams", 1) > 1:
        raise UsageError(f"the task generates with {options}; only greedy generation is supported")
    until = options.get("until") or []
    return (until,) if isinstance(until, str) else tuple(until), options.get("max_gen_toks", _MAX_TOKENS)
