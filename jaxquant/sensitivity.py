"""What a model loses on several domains where one unit alone is quantized: what bits are given by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxquant.calibrate.collect import batches, embed_all, pass_block
from jaxquant.calibrate.moments import Moments
from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.evaluate.probe import Domain, Probe
from jaxquant.io import checkpoint
from jaxquant.io.source import Source, load_params
from jaxquant.methods import Problem
from jaxquant.models.config import EXACT, LINEARS, ModelConfig
from jaxquant.recipe import Recipe

#: What is quantized at a time.
Unit = Literal["block", "linear"]
FORMAT = 1
_TAP_OF = {path: tap for tap, paths in LINEARS for path in paths}


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
      facts: of model, recipe, calibration and domains; notes.
    """

    units: tuple[str, ...]
    bits: tuple[int, ...]
    sizes: Int[np.ndarray, " units"]
    costs: Int[np.ndarray, "units widths"]
    nll: dict[str, Float[np.ndarray, "units widths"]]
    kl: dict[str, Float[np.ndarray, "units widths"]]
    kl_stderr: dict[str, Float[np.ndarray, "units widths"]]
    facts: dict[str, Any]


def measure_sensitivity(
    source: Source,
    recipes: Mapping[int, Recipe],
    moments: Mapping[str, Moments],
    domains: Mapping[str, Domain],
    path: Path,
    *,
    unit: Unit = "block",
    describe: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
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
      describe: facts about the calibration, which tell one table from another.
      notes: more about it, kept in the file.
      on_cell: called with `(cells done, cells in total)`.

    Raises:
      UsageError: an unknown `unit`, no domain or recipe, one that does more than round linears, or groups
        that do not divide the inputs of a linear.
      InputError: `path` holds a table of a different model, recipe, calibration or domain.
      NonFiniteError: a loss is NaN or infinite; names unit, bits and domain.
    """
    if not domains or not recipes:
        raise UsageError("sensitivity needs a domain and a recipe at least")
    # Small losses drown in the rounding of half-precision activations.
    config = dataclasses.replace(source.config, dtype="float32")
    units = units_of(config, unit)
    facts = table_facts(source, recipes, domains, unit, describe or {})
    stored = begun_table(path, facts)
    cells = {} if stored is None else stored["cells"]
    kept = {"format": FORMAT, **facts, "notes": dict(notes or {})}
    params = load_params(source, "float32")
    probes = {name: Probe.of(params, config, domain) for name, domain in domains.items()}
    states = {name: embed_all(params, config, domain.tokens) for name, domain in domains.items()}
    total, done = len(units) * len(recipes), 0
    for index in range(config.num_layers):
        original = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
        for name in (name for name in units if int(name.split(".")[1]) == index):
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
            checkpoint.write_text(path, json.dumps({**kept, "cells": cells}, indent=1) + "\n")
        for state in states.values():
            for part in batches(state):
                state[part] = pass_block(original, config, state[part], sliding=config.slides(index))
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

    sizes, costs = stored_bits(config, recipes, units)
    return Sensitivity(
        units=tuple(units),
        bits=tuple(bits),
        sizes=sizes,
        costs=costs,
        nll=table("nll"),
        kl=table("kl"),
        kl_stderr=table("kl_stderr"),
        facts={key: stored[key] for key in ("model", "recipes", "domains", "unit", "calibration", "notes")},
    )


def table_facts(
    source: Source,
    recipes: Mapping[int, Recipe],
    domains: Mapping[str, Domain],
    unit: Unit,
    describe: Mapping[str, Any],
) -> dict[str, Any]:
    """What tells one table from another; arguments as in `measure_sensitivity`.

    Raises:
      UsageError: a recipe does more than round linears.
    """
    for recipe in recipes.values():
        whole = recipe.folds or recipe.finishes or recipe.surgery or recipe.precision != EXACT
        if whole or recipe.keeps or recipe.needs_gradients or recipe.needs_originals:
            raise UsageError(
                f"sensitivity: {recipe} does more than round linears; use rtn, gptq or osaq-gptq"
            )
    facts = {
        "model": {"name": source.name, "fingerprint": source.fingerprint()},
        "recipes": {str(bits): recipe.to_dict() for bits, recipe in sorted(recipes.items())},
        "domains": {name: domain.facts() for name, domain in domains.items()},
        "unit": unit,
        "calibration": dict(describe),
    }
    return json.loads(json.dumps(facts))


def begun_table(path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """What `path` holds, finished or not, if it is a table of `facts`; `None` if there is nothing.

    Raises:
      InputError: it holds something else.
    """
    if not path.is_file():
        return None
    stored = _load(path)
    for key, wanted in facts.items():
        if wanted != stored.get(key):
            raise InputError(
                f"{path} was measured with a different {key.removesuffix('s')}; give the same, or "
                "another --table"
            )
    return stored


def stored_bits(
    config: ModelConfig, recipes: Mapping[int, Recipe], units: Sequence[str]
) -> tuple[Int[np.ndarray, " units"], Int[np.ndarray, "units widths"]]:
    """Weights of every unit, and the bits that are stored for it by each recipe, widths ascending.

    Raises:
      UsageError: groups do not divide the inputs of a linear; names it.
    """

    def cost(unit: str, recipe: Recipe) -> int:
        block = ".".join(unit.split(".")[:2])
        linears = [f"{block}.{path}" for path in _paths(unit)]
        shapes = [config.linear_shape(path) for path in _paths(unit)]
        stored = (
            recipe.at(linear).stored_bytes(*shape, where=linear)
            for linear, shape in zip(linears, shapes, strict=True)
        )
        return round(8 * sum(stored))

    sizes = [sum(np.prod(config.linear_shape(path)) for path in _paths(unit)) for unit in units]
    costs = [[cost(unit, recipe) for _, recipe in sorted(recipes.items())] for unit in units]
    return np.array(sizes), np.array(costs)


def units_of(config: ModelConfig, unit: Unit) -> list[str]:
    """Paths of the units, in the order of the model.

    Raises:
      UsageError: `unit` is neither word.
    """
    if unit not in get_args(Unit):
        raise UsageError(f"unknown unit {unit!r}; use {' or '.join(get_args(Unit))}")
    blocks = [f"blocks.{index}" for index in range(config.num_layers)]
    return blocks if unit == "block" else [f"{block}.{path}" for block in blocks for path in checkpoint.PATHS]


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
