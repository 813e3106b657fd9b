"""From texts to bits: what calibrates, what is measured, and the recipe that a budget buys (TASA)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from jaxquant.calibrate.collect import model_moments
from jaxquant.calibrate.mixture import energy_traces, mix, search_mixture
from jaxquant.calibrate.moments import Mask
from jaxquant.calibrate.text import eval_windows, read_text, token_ids, windows
from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate.probe import Domain, gold_tokens
from jaxquant.evaluate.task_data import load_items
from jaxquant.folder import token_facts
from jaxquant.io import checkpoint
from jaxquant.io.source import Source, load_params
from jaxquant.methods import aggregate, allocate, isotonic, kendall_interval
from jaxquant.models.config import ModelConfig
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, by_path, to_toml
from jaxquant.report import write_allocation
from jaxquant.sensitivity import (
    Sensitivity,
    Unit,
    begun_table,
    measure_sensitivity,
    read_sensitivity,
    stored_bits,
    table_facts,
    units_of,
)
from jaxquant.texts import solved

#: Loss whose increase counts.
Metric = Literal["kl", "nll"]
# Tokens of a measured window of general text.
_WINDOW = 128
# Tokens of a measured row.
_LONGEST = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Where one domain comes from: `name` and what to read.

    Attributes:
      task: rows of the task `name` (see `evaluate.task_data`), or running text.
    """

    name: str
    source: str
    task: bool

    def parts(self, source: Source, *, items: int) -> tuple[Domain, str, str]:
        """What is measured, its text, and the rest, for calibration: no token is in both.

        Raises:
          InputError: nothing is left to calibrate on.
        """
        if self.task:
            rows = load_items(self.name, self.source)
            # Those that are too long for a cell calibrate.
            lengths = [sum(map(len, gold_tokens(row, source.tokenizer(), source.config))) for row in rows]
            ordered = sorted(zip(lengths, rows, strict=True), key=lambda pair: pair[0] > _LONGEST)
            rows = [row for _, row in ordered]
            if len(rows) <= items:
                raise InputError(
                    f"{self.source}: {len(rows)} rows, of which {items} are measured; give a longer file, or "
                    "fewer --items"
                )
            domain = Domain.of_items(rows[:items], source.tokenizer(), source.config, longest=_LONGEST)
            return domain, solved(rows[:items]), solved(rows[items:])
        text = read_text(self.source)
        # Whole lines, about half of the text at most.
        cut = text.rfind("\n", 0, len(text) // 2) + 1 or len(text) // 2
        tokens = eval_windows(text[:cut], source.tokenizer(), source.config, seqlen=_WINDOW, limit=items)
        return Domain.of_windows(tokens), text[:cut], text[cut:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits of every unit, and what they cost.

    Attributes:
      table: what was measured.
      choice: column of the table for every unit.
      sensitivity: S, see `methods.tasa`, monotone in the bits.
      task, general: names of the domains.
    """

    table: Sensitivity
    choice: Int[np.ndarray, " units"]
    sensitivity: np.ndarray
    task: tuple[str, ...]
    general: tuple[str, ...]

    @property
    def bits(self) -> list[int]:
        """Bits of every unit."""
        return [self.table.bits[column] for column in self.choice]

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, scales and zeros included."""
        units = np.arange(len(self.choice))
        return float(self.table.costs[units, self.choice].sum() / self.table.sizes.sum())

    def predicted(self, metric: Metric, domain: str) -> float:
        """The sum of the units' losses on a domain, in nats a token: the loss of all, if losses add up."""
        return float(getattr(self.table, metric)[domain][np.arange(len(self.choice)), self.choice].sum())

    @property
    def recipes(self) -> dict[int, Recipe]:
        """What is done at every width."""
        return {int(bits): Recipe.from_dict(recipe) for bits, recipe in self.table.facts["recipes"].items()}

    def recipe(self) -> Recipe:
        """The recipe with these bits: the most frequent width, and rules for the units of others."""
        recipes = self.recipes
        usual = max(recipes, key=lambda bits: (self.bits.count(bits), -bits))
        blocks: dict[tuple[int, str], list[str]] = {}
        for unit, bits in zip(self.table.units, self.bits, strict=True):
            _, block, *linear = unit.split(".", 2)
            if bits != usual:
                blocks.setdefault((bits, "".join(linear)), []).append(block)
        rules = {
            rf"^blocks\.({'|'.join(own)})\." + (re.escape(linear) + "$" if linear else ""): recipes[bits]
            for (bits, linear), own in blocks.items()
        }
        return by_path(rules, recipes[usual])


def measure(
    source: Source,
    recipes: Mapping[int, Recipe],
    texts: Sequence[Texts],
    path: Path,
    *,
    unit: Unit = "block",
    items: int = 64,
    samples: int = 16,
    seqlen: int = 512,
    seed: int = 0,
    on_cell: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Searches the calibration mixture and measures the table of `sensitivity.measure_sensitivity`.

    The search leaves out the first token of a window, whose massive activations are alike in all texts; the
    recipes see it unless they mask it themselves, since attention rests on what it becomes. The moments of
    all taps of all blocks are held for every text and for a mixture, 4 bytes a number: .4 GB each for
    SmolLM2-135M, 33 GB for an 8B model.

    Args:
      source, recipes, path, unit, on_cell: as there.
      texts: the domains, of both kinds.
      items: rows of a task of at most 256 tokens, or windows of 128, that are measured; the rest calibrates.
      samples, seqlen, seed: calibration windows of each text.

    Raises:
      UsageError: no task or no general text, two of one name, or what `measure_sensitivity` refuses.
      InputError: a text is too short or unreadable, or `path` holds another table.
    """
    names = [text.name for text in texts]
    if {text.task for text in texts} != {True, False} or len(set(names)) < len(names):
        raise UsageError(
            f"domains {', '.join(names) or 'none'}: give a task and a general text, of different names"
        )
    masks: list[Mask] = [recipe.mask for recipe in recipes.values()]
    if len(set(masks)) != 1:
        raise UsageError(f"give recipes, and all of them one mask, not {', '.join(masks) or 'none'}")
    parts = {text.name: text.parts(source, items=items) for text in texts}
    domains = {name: domain for name, (domain, _, _) in parts.items()}
    tokenizer, config = source.tokenizer(), source.config
    calibration = {
        name: windows(rest, tokenizer, config, samples=samples, seqlen=seqlen, seed=seed)
        for name, (_, _, rest) in parts.items()
    }
    describe = {
        "tasks": [text.name for text in texts if text.task],
        "items": items,
        "seed": seed,
        "windows": {name: token_facts(tokens, {}) for name, tokens in calibration.items()},
    }
    facts = table_facts(source, recipes, domains, unit, describe)
    stored = begun_table(path, facts)
    if stored is not None:
        with contextlib.suppress(InputError):
            return read_sensitivity(path, source)

    params = load_params(source, "float32")
    seen = functools.partial(model_moments, params, config)

    def short(text: str) -> np.ndarray:
        length = min(_WINDOW, token_ids(text, tokenizer, config).size)
        return eval_windows(text, tokenizer, config, seqlen=length, limit=items)

    if stored is None:
        targets = [energy_traces(seen(short(text), mask="first")) for _, text, _ in parts.values()]
        found = {name: seen(own, mask="first") for name, own in calibration.items()}
        search = search_mixture(found, np.mean(targets, axis=0))
        del found
        notes = {
            "texts": {text.name: text.source for text in texts},
            "shares": search.best,
            "search": {
                "names": list(search.names),
                "shares": search.shares.tolist(),
                "alignment": search.alignment.tolist(),
                "diversity": search.diversity.tolist(),
                "nu": search.nu,
            },
        }
    else:
        # Another number of cores may round to another best share.
        notes = stored["notes"]
    moments = mix({name: seen(own, mask=masks[0]) for name, own in calibration.items()}, notes["shares"])
    del seen, params  # another copy is loaded
    return measure_sensitivity(
        source, recipes, moments, domains, path, unit=unit, describe=describe, notes=notes, on_cell=on_cell
    )


def allocation(table: Sensitivity, budget: float, *, beta: float = 0.7, metric: Metric = "kl") -> Allocation:
    """Bits for `budget` effective bits a weight, by the domains of `table`; see `methods.tasa`.

    Several tasks, or several general texts, count equally.

    Args:
      budget: scales and zeros included.
      beta: weight of the tasks; 0: the general texts alone.
      metric: `"kl"`, less noisy and never below 0 but for rounding, or `"nll"`.

    Raises:
      UsageError: no allocation meets the budget, `beta` is out of range, or an unknown `metric`.
    """
    _check_metric(metric)
    losses = getattr(table, metric)
    task = tuple(name for name in losses if name in table.facts["calibration"]["tasks"])
    general = tuple(name for name in losses if name not in task)
    if not task or not general:
        raise UsageError(f"domains {', '.join(losses)}: a task and a general text are needed")
    pairs = [aggregate(losses[a], losses[b], beta=beta) for a in task for b in general]
    s = isotonic(np.mean(pairs, axis=0))
    choice = allocate(s, table.costs, table.sizes, budget)
    return Allocation(table=table, choice=choice, sensitivity=s, task=task, general=general)


def measure_table(
    source: Source,
    table: Path,
    *,
    tasks: Mapping[str, str],
    general: Mapping[str, str],
    widths: Sequence[int],
    recipe: str,
    group_size: int | None,
    unit: str,
    items: int,
    samples: int,
    seqlen: int,
    seed: int,
    budget: float,
    beta: float,
    metric: str,
    on_cell: Callable[[int, int], None] | None = None,
) -> None:
    """`measure` on grids with clip search; arguments as on the command line.

    Raises:
      UsageError: what `allocation` would refuse afterwards: the budget, beta or the metric.
    """
    texts = [Texts(name=name, source=file, task=True) for name, file in tasks.items()]
    texts += [Texts(name=name, source=file, task=False) for name, file in general.items()]
    grids = {bits: Grid(bits=bits, group_size=group_size, clip="mse") for bits in widths}
    recipes = {bits: named(recipe, grid) for bits, grid in grids.items()}
    _check(source.config, recipes, unit, budget, beta=beta, metric=metric)
    measure(
        source,
        recipes,
        texts,
        table,
        unit=unit,  # pyright: ignore[reportArgumentType]
        items=items,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        on_cell=on_cell or (lambda done, total: None),
    )


def write_recipe(
    source: Source, table: Path, out: Path, *, budget: float, beta: float, metric: str
) -> dict[str, Any]:
    """Writes the recipe that `budget` buys by `table`, and its page beside it; what it is in plain types."""
    found = allocation(read_sensitivity(table, source), budget, beta=beta, metric=metric)  # pyright: ignore[reportArgumentType]
    checkpoint.write_text(out, to_toml(found.recipe()))
    calibration, notes = (found.table.facts[key] for key in ("calibration", "notes"))
    result: dict[str, Any] = {
        "model": source.name,
        "table": str(table),
        "recipe": str(out),
        "budget": budget,
        "effective_bits": found.effective_bits,
        "beta": beta,
        "metric": metric,
        "units": dict(zip(found.table.units, found.bits, strict=True)),
        "tasks": list(found.task),
        "general": list(found.general),
        "predicted": {name: found.predicted(metric, name) for name in found.table.kl},  # pyright: ignore[reportArgumentType]
        "texts": notes["texts"],
        "shares": notes["shares"],
        **{key: calibration["windows"][found.task[0]][key] for key in ("samples", "seqlen")},
        "seed": calibration["seed"],
    }
    losses = getattr(found.table, metric)
    rankings = [
        np.mean([losses[name][:, 0] for name in names], axis=0) for names in (found.task, found.general)
    ]
    if all(np.ptp(ranking) > 0 for ranking in rankings):
        tau, low, high = kendall_interval(*rankings, seed=0)
        result["tau"] = {"bits": found.table.bits[0], "tau": tau, "low": low, "high": high}
    return {**result, "page": str(write_allocation(out.with_suffix(".html"), found, result))}


def _check(
    config: ModelConfig, recipes: Mapping[int, Recipe], unit: str, budget: float, *, beta: float, metric: str
) -> None:
    """Refuses before an hour of measurement what would be refused behind it."""
    _check_metric(metric)
    sizes, costs = stored_bits(config, recipes, units_of(config, unit))  # pyright: ignore[reportArgumentType]
    even = np.ones(costs.shape)
    allocate(aggregate(even, even, beta=beta), costs, sizes, budget)


def _check_metric(metric: str) -> None:
    if metric not in get_args(Metric):
        raise UsageError(f"unknown metric {metric!r}; use {' or '.join(get_args(Metric))}")
