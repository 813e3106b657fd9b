"""What a model loses on several domains where one unit alone is quantized: what bits are given by."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer

from jaxquant.calibrate.collect import batches, embed_all
from jaxquant.calibrate.moments import Moments
from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.evaluate.continuations import encode_pair
from jaxquant.evaluate.scoring import head_only, over_tokens
from jaxquant.evaluate.task_data import Item
from jaxquant.io import checkpoint
from jaxquant.io.source import Source, load_params
from jaxquant.methods import Problem
from jaxquant.models import decoder
from jaxquant.models.config import LINEARS, ModelConfig
from jaxquant.recipe import Recipe

#: What is quantized at a time.
Unit = Literal["block", "linear"]
FORMAT = 1
_TAP_OF = {path: tap for tap, paths in LINEARS for path in paths}


@dataclasses.dataclass(frozen=True)
class Domain:
    """Texts that a loss is measured on.

    Attributes:
      tokens: int32 `[n, T]`, shorter ones padded at the end.
      scored: bool `[n, T]`: tokens that the model has to predict; never the first.
    """

    tokens: Int[np.ndarray, "n T"]
    scored: Bool[np.ndarray, "n T"]

    @classmethod
    def of_windows(cls, tokens: Int[np.ndarray, "n T"]) -> Domain:
        """Running text: every token after the first of a window."""
        scored = np.ones(tokens.shape, bool)
        scored[:, 0] = False
        return cls(tokens, scored)

    @classmethod
    def of_items(
        cls, items: Sequence[Item], tokenizer: Tokenizer, config: ModelConfig, *, longest: int = 256
    ) -> Domain:
        """Right answers, given their questions; items of more than `longest` tokens are left out.

        Raises:
          InputError: no item is short enough.
        """
        pairs = [
            encode_pair(tokenizer, config, item.contexts[item.gold], item.continuations[item.gold])
            for item in items
        ]
        pairs = [(head, tail) for head, tail in pairs if len(head) + len(tail) <= longest]
        if not pairs:
            raise InputError(f"none of {len(items)} items has at most {longest} tokens; give shorter ones")
        width = max(len(head) + len(tail) for head, tail in pairs)
        tokens, scored = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), width), bool)
        for row, (head, tail) in enumerate(pairs):
            tokens[row, : len(head) + len(tail)] = head + tail
            scored[row, len(head) : len(head) + len(tail)] = True
        return cls(tokens, scored)

    def facts(self) -> dict[str, Any]:
        """What tells one domain from another."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes() + self.scored.tobytes())
        return {"sha256": digest.hexdigest(), "texts": len(self.tokens), "scored": int(self.scored.sum())}


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The table: one row a unit, one column a width.

    Attributes:
      units: paths such as `blocks.3`, or `blocks.3.mlp.down`.
      bits: widths, ascending.
      sizes: weights of each unit.
      costs: bits stored for a unit at a width, scales and zeros included.
      nll, kl: by domain, `[units, widths]` in nats per scored token: how much the negative log-likelihood
        grows, and `KL(original || quantized)`.
      kl_stderr: standard errors of `kl` over the texts of the domain.
      facts: of model, recipe, calibration and domains.
    """

    units: tuple[str, ...]
    bits: tuple[int, ...]
    sizes: Int[np.ndarray, " units"]
    costs: Int[np.ndarray, "units widths"]
    nll: dict[str, Float[np.ndarray, "units widths"]]
    kl: dict[str, Float[np.ndarray, "units widths"]]
    kl_stderr: dict[str, Float[np.ndarray, "units widths"]]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the losses of a domain need of the original model, a row a scored token.

    Attributes:
      text, place: text and place of the activation that predicts the token.
      mean: `E p`, p the probabilities of the original.
      entropy: of p, in nats.
      target: the column of `E` of the token.
      nll: of the original.
    """

    text: np.ndarray
    place: np.ndarray
    mean: jax.Array
    entropy: jax.Array
    target: jax.Array
    nll: np.ndarray

    @classmethod
    def of(cls, params: dict[str, Any], config: ModelConfig, domain: Domain) -> Probe:
        """The original model's answers."""
        text, place = np.nonzero(domain.scored)
        place = place - 1
        rows = []
        for part in batches(domain.tokens):
            hidden, _ = _final_hidden(params, config, jnp.asarray(domain.tokens[part]))
            own = (text >= part.start) & (text < part.stop)
            rows.append(hidden[text[own] - part.start, place[own]])
        hidden = jnp.concatenate(rows)
        mean, entropy, lse = _answers(head_only(params, config), config, hidden)
        tokens = jnp.asarray(domain.tokens[text, place + 1])
        target = params["embed"][tokens] if config.tie_embeddings else params["head"].T[tokens]
        nll = lse - jnp.sum(hidden * target, axis=-1)
        return cls(text, place, mean, entropy, target, np.asarray(nll))

    def by_token(
        self, params: dict[str, Any], config: ModelConfig, changed: Any, state: np.ndarray, index: int
    ) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
        """Growth of the NLL and `KL(original || changed)` of every scored token, in nats.

        Of a model that is quantized throughout, give its own `params`, its first block, what `embed_all`
        gives, and index 0; its head must be the original's.

        Args:
          params: of the whole model in floating point, blocks stacked.
          changed: block `index`, instead of that in `params`.
          state: what enters block `index`, `[n, T, d]`.
          index: of the first block that is run.
        """
        nll, kl = [], []
        for part in batches(state):
            own = np.flatnonzero((self.text >= part.start) & (self.text < part.stop))
            found = _losses(
                params, config, changed, state[part], np.int32(index), self.text[own] - part.start,
                self.place[own], self.mean[own], self.entropy[own], self.target[own],
            )  # fmt: skip
            nll.append(np.asarray(found[0]))
            kl.append(np.asarray(found[1]))
        growth = np.concatenate(nll).astype(np.float64) - self.nll
        return growth, np.concatenate(kl).astype(np.float64)

    def losses(
        self, params: dict[str, Any], config: ModelConfig, changed: Any, state: np.ndarray, index: int
    ) -> dict[str, float]:
        """Means of `by_token`, and the standard error of the divergence over texts."""
        growth, kl = self.by_token(params, config, changed, state, index)
        texts = np.unique(self.text)
        share = len(self.text) / len(texts)
        # A mean of ratios would give short texts more weight; this is the ratio's linearized error.
        apart = [np.sum(kl[self.text == t] - kl.mean()) / share for t in texts]
        return {
            "nll": float(growth.mean()),
            "kl": float(kl.mean()),
            "kl_stderr": float(np.std(apart, ddof=1) / len(texts) ** 0.5) if len(texts) > 1 else 0.0,
        }


def measure_sensitivity(
    source: Source,
    recipes: Mapping[int, Recipe],
    moments: Mapping[str, Moments],
    domains: Mapping[str, Domain],
    path: Path,
    *,
    unit: Unit = "block",
    describe: Mapping[str, Any] | None = None,
    on_cell: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Quantizes one unit at a time, all others in floating point, and measures what each domain loses.

    What enters a block is computed once, so a cell costs the blocks behind it and the head. Neither NLL nor
    divergence needs the logits of the original: with `E` the head, `z = h E` and p the original's
    probabilities,

        KL(p || softmax z) = lse(z) - h . (E p) - entropy(p)

    where `E p` is one vector a token. TASA (arXiv 2607.00908) takes perplexities; these losses add up.

    Args:
      source: the model; all of it is held in memory, in float32.
      recipes: bits: what is done to a linear.
      moments: of all blocks, by tap, with a leading layer axis (`calibrate.collect.model_moments`,
        `calibrate.mixture.mix`).
      domains: by name.
      path: JSON file, written after every unit; what is there is not measured again.
      unit: `"block"`, or `"linear"` for 7 times as many cells.
      describe: facts about the calibration, kept in the file.
      on_cell: called with `(cells done, cells in total)`.

    Raises:
      UsageError: an unknown `unit`, no domain or recipe, one that does more than round linears, or groups
        that do not divide the inputs of a linear.
      InputError: `path` holds a table of a different model, recipe, calibration or domain.
      NonFiniteError: a loss is NaN or infinite; names unit, bits and domain.
    """
    if unit not in get_args(Unit):
        raise UsageError(f"unknown unit {unit!r}; use {' or '.join(get_args(Unit))}")
    if not domains or not recipes:
        raise UsageError("sensitivity needs a domain and a recipe at least")
    for recipe in recipes.values():
        if recipe.folds or recipe.finishes or recipe.surgery or recipe.keeps or recipe.needs_gradients:
            raise UsageError(
                f"sensitivity: {recipe} does more than round linears; use rtn, gptq or osaq-gptq"
            )
    # Small losses drown in the rounding of half-precision activations.
    config = dataclasses.replace(source.config, dtype="float32")
    units = units_of(config, unit)
    facts = {
        "model": {"name": source.name, "fingerprint": source.fingerprint()},
        "recipes": {str(bits): recipe.to_dict() for bits, recipe in sorted(recipes.items())},
        "domains": {name: domain.facts() for name, domain in domains.items()},
        "unit": unit,
        "calibration": dict(describe or {}),
    }
    cells = _begin(path, facts)
    params = load_params(source, "float32")
    probes = {name: Probe.of(params, config, domain) for name, domain in domains.items()}
    states = {name: embed_all(params, config, domain.tokens) for name, domain in domains.items()}
    total, done = len(units) * len(recipes), 0
    for index in range(config.num_layers):
        original = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
        for name in [
            name for name in units if name == f"blocks.{index}" or name.startswith(f"blocks.{index}.")
        ]:
            for bits, recipe in sorted(recipes.items()):
                if str(bits) not in cells.setdefault(name, {}):
                    changed = _quantized(original, recipe, moments, index, _paths(name))
                    losses = {
                        domain: probe.losses(params, config, changed, states[domain], index)
                        for domain, probe in probes.items()
                    }
                    _check(losses, name, bits)
                    cells[name][str(bits)] = losses
                on_cell(done := done + 1, total)
            checkpoint.write_text(
                path, json.dumps({"format": FORMAT, **facts, "cells": cells}, indent=1) + "\n"
            )
        for state in states.values():
            for part in batches(state):
                state[part] = _through(original, config, state[part], sliding=config.slides(index))
    return read_sensitivity(path, source)


def read_sensitivity(path: Path, source: Source) -> Sensitivity:
    """The table that `measure_sensitivity` wrote, if it is of `source` and whole.

    Raises:
      InputError: no such file, no table, an unfinished one, or one of another model.
    """
    stored = _load(path)
    config = source.config
    if stored["model"]["fingerprint"] != source.fingerprint():
        raise InputError(
            f"{path} is a table of {stored['model']['name']}, not of {source.name}; give the model it was "
            "measured on, or another --table"
        )
    units = units_of(config, stored["unit"])
    recipes = {int(bits): Recipe.from_dict(recipe) for bits, recipe in stored["recipes"].items()}
    cells, bits = stored["cells"], sorted(recipes)
    missing = [f"{name} at {b} bits" for name in units for b in bits if str(b) not in cells.get(name, {})]
    if missing:
        raise InputError(f"{path} lacks {missing[0]} and {len(missing) - 1} more; finish the measurement")

    def table(kind: str) -> dict[str, np.ndarray]:
        return {
            domain: np.array([[cells[name][str(b)][domain][kind] for b in bits] for name in units])
            for domain in stored["domains"]
        }

    shapes = [[config.linear_shape(own) for own in _paths(name)] for name in units]
    costs = [
        [round(sum(n * m * recipes[b].grid.effective_bits(n) for n, m in own)) for b in bits]
        for own in shapes
    ]
    return Sensitivity(
        units=tuple(units),
        bits=tuple(bits),
        sizes=np.array([sum(n * m for n, m in own) for own in shapes]),
        costs=np.array(costs),
        nll=table("nll"),
        kl=table("kl"),
        kl_stderr=table("kl_stderr"),
        facts={key: stored[key] for key in ("model", "recipes", "domains", "unit", "calibration")},
    )


def units_of(config: ModelConfig, unit: Unit) -> list[str]:
    """Paths of the units, in the order of the model."""
    blocks = [f"blocks.{index}" for index in range(config.num_layers)]
    return blocks if unit == "block" else [f"{block}.{path}" for block in blocks for path in checkpoint.PATHS]


@functools.partial(jax.jit, static_argnames="config")
def _final_hidden(params: Any, config: ModelConfig, tokens: jax.Array) -> Any:
    return decoder.final_hidden(params, config, tokens)


@functools.partial(jax.jit, static_argnames="config")
def _answers(head: dict[str, Any], config: ModelConfig, hidden: jax.Array) -> tuple[jax.Array, ...]:
    """`E p`, the entropy of p, and `logsumexp`, of every activation."""
    table = head["embed"] if config.tie_embeddings else head["head"].T

    def answer(hidden: jax.Array) -> tuple[jax.Array, ...]:
        scores = decoder.logits(head, config, hidden)
        lse = jax.nn.logsumexp(scores, axis=-1)
        p = jnp.exp(scores - lse[:, None])
        mean = jnp.matmul(p.astype(table.dtype), table, precision="highest")
        return mean, lse - jnp.sum(p * scores, axis=-1), lse

    return over_tokens(answer, config.vocab_size, hidden)


@functools.partial(jax.jit, static_argnames="config")
def _losses(
    params: Any, config: ModelConfig, changed: Any, x: jax.Array, index: jax.Array, text: jax.Array,
    place: jax.Array, mean: jax.Array, entropy: jax.Array, target: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """NLL and KL of scored tokens: block `index` is `changed`, those behind it are the original's."""
    flags = [config.slides(i) for i in range(config.num_layers)]
    mixed = len(set(flags)) > 1

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda whole, new: jnp.where(i == index, new, whole[i]), params["blocks"], changed)
        flag = jnp.asarray(flags)[i] if mixed else flags[0]
        return decoder.block(own, config, x, sliding=flag)[0]

    x = jax.lax.fori_loop(index, config.num_layers, step, x)
    hidden = decoder.rms_norm(x, params["norm"], config)[text, place]
    head = head_only(params, config)

    def score(hidden: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(decoder.logits(head, config, hidden), axis=-1)

    lse = over_tokens(score, config.vocab_size, hidden)
    nll, cross = (lse - jnp.sum(hidden * row, axis=-1) for row in (target, mean))
    return nll, cross - entropy


@functools.partial(jax.jit, static_argnames=("config", "sliding"))
def _through(params: Any, config: ModelConfig, x: jax.Array, *, sliding: bool) -> jax.Array:
    return decoder.block(params, config, x, sliding=sliding)[0]


def _quantized(
    original: Any, recipe: Recipe, moments: Mapping[str, Moments], index: int, paths: Sequence[str]
) -> Any:
    """The block with the linears at `paths` rounded, as floats."""
    changed = {**original, "attn": dict(original["attn"]), "mlp": dict(original["mlp"])}
    for path in paths:
        part, name = path.split(".")
        own = recipe.at(f"blocks.{index}.{path}")
        seen = jax.tree.map(lambda leaf: leaf[index], moments[_TAP_OF[path]])
        kernel = original[part][name]["kernel"]
        values = own(Problem.of(kernel, seen, own.grid)).values(kernel.dtype)
        changed[part][name] = {**original[part][name], "kernel": values}
    return changed


def _paths(unit: str) -> tuple[str, ...]:
    """Linears of a unit, as paths inside its block."""
    own = unit.split(".", 2)[2:]
    return tuple(own) or checkpoint.PATHS


def _check(losses: dict[str, dict[str, float]], name: str, bits: int) -> None:
    for domain, own in losses.items():
        if not np.isfinite(list(own.values())).all():
            raise NonFiniteError(
                f"{name} at {bits} bits: the loss on {domain} is not finite; check the model"
            )


def _begin(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Cells of an unfinished table of the same facts, or none."""
    if not path.is_file():
        return {}
    stored = _load(path)
    for key, wanted in facts.items():
        if json.loads(json.dumps(wanted)) != stored.get(key):
            raise InputError(
                f"{path} was measured with a different {key.removesuffix('s')}; give the same, or "
                "another --table"
            )
    return stored["cells"]


def _load(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such table; measure one first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); measure the table again") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or "cells" not in stored:
        raise InputError(f"{path} is no sensitivity table of this version; measure it again")
    return stored
