"""From texts to bits: what calibrates, what is measured, and the recipe that a budget buys (TASA)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from jaxquant.calibrate.collect import model_moments
from jaxquant.calibrate.mixture import MixtureSearch, energy_traces, mix, search_mixture
from jaxquant.calibrate.text import eval_windows, read_text, token_ids, windows
from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate.probe import Domain
from jaxquant.evaluate.task_data import load_items
from jaxquant.io import checkpoint
from jaxquant.io.source import Source, load_params
from jaxquant.methods import aggregate, allocate, isotonic, kendall_interval
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, by_path, to_toml
from jaxquant.report import write_allocation
from jaxquant.sensitivity import Sensitivity, Unit, measure_sensitivity, read_sensitivity

#: Loss whose increase counts.
Metric = Literal["kl", "nll"]
# Tokens of a measured window of general text.
_WINDOW = 128


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
            if len(rows) <= items:
                raise InputError(
                    f"{self.source}: {len(rows)} rows, of which {items} are measured; give a longer file, or "
                    "fewer --items"
                )
            domain = Domain.of_items(rows[:items], source.tokenizer(), source.config)
            measured, rest = (
                "\n\n".join(row.solved for row in part) for part in (rows[:items], rows[items:])
            )
            return domain, measured, rest
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


def search_calibration(
    source: Source,
    texts: Mapping[str, str],
    measured: Sequence[str],
    *,
    items: int,
    samples: int,
    seqlen: int,
    seed: int,
) -> tuple[MixtureSearch, dict[str, Any]]:
    """The shares of calibration texts, and the moments of that mixture; see `calibrate.mixture`.

    Args:
      source: the model; all of it is held in memory.
      texts: by name.
      measured: of each domain; the mean of their traces is the target.
      items: windows of 128 tokens of each of these.
      samples, seqlen, seed: windows of each of the texts.
    """
    params = load_params(source, "float32")

    def seen(tokens: np.ndarray) -> Any:
        return model_moments(params, source.config, tokens, mask="first")

    found = {
        name: seen(
            windows(text, source.tokenizer(), source.config, samples=samples, seqlen=seqlen, seed=seed)
        )
        for name, text in texts.items()
    }

    def short(text: str) -> np.ndarray:
        length = min(_WINDOW, token_ids(text, source.tokenizer(), source.config).size)
        return eval_windows(text, source.tokenizer(), source.config, seqlen=length, limit=items)

    target = np.mean([energy_traces(seen(short(text))) for text in measured], axis=0)
    search = search_mixture(found, target)
    return search, mix(found, search.best)


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

    Args:
      source, recipes, path, unit, on_cell: as there.
      texts: the domains.
      items: rows of a task, or windows of 128 tokens, that are measured; the rest of a text calibrates.
      samples, seqlen, seed: calibration windows of each text.

    Raises:
      UsageError: fewer than two domains, or two of one name, or what `measure_sensitivity` refuses.
      InputError: a text is too short or unreadable, or `path` holds another table.
    """
    names = [text.name for text in texts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(
            f"domains {', '.join(names) or 'none'}: give a task and a general text, of different names"
        )
    parts = {text.name: text.parts(source, items=items) for text in texts}
    domains = {name: domain for name, (domain, _, _) in parts.items()}
    rest = {name: text for name, (_, _, text) in parts.items()}
    measured = [text for _, text, _ in parts.values()]
    search, moments = search_calibration(
        source, rest, measured, items=items, samples=samples, seqlen=seqlen, seed=seed
    )
    best = int(np.argmax(search.objective))
    describe = {
        "texts": {text.name: text.source for text in texts},
        "tasks": [text.name for text in texts if text.task],
        "shares": search.best,
        "alignment": float(search.alignment[best]),
        "diversity": float(search.diversity[best]),
        "nu": search.nu,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "items": items,
    }
    return measure_sensitivity(
        source, recipes, moments, domains, path, unit=unit, describe=describe, on_cell=on_cell
    )


def allocation(table: Sensitivity, budget: float, *, beta: float = 0.7, metric: Metric = "kl") -> Allocation:
    """Bits for `budget` effective bits a weight, by the domains of `table`; see `methods.tasa`.

    Several tasks, or several general texts, count equally.

    Args:
      budget: scales and zeros included.
      beta: weight of the tasks; 0: the general texts alone.
      metric: `"kl"`, less noisy and never below 0, or `"nll"`.

    Raises:
      UsageError: no allocation meets the budget, `beta` is out of range, or an unknown `metric`.
    """
    if metric not in get_args(Metric):
        raise UsageError(f"unknown metric {metric!r}; use {' or '.join(get_args(Metric))}")
    losses = getattr(table, metric)
    task = tuple(name for name in losses if name in table.facts["calibration"]["tasks"])
    general = tuple(name for name in losses if name not in task)
    mean = {
        kind: np.mean([losses[name] for name in names], axis=0)
        for kind, names in (("task", task), ("general", general))
        if names
    }
    if len(mean) < 2:
        only = next(iter(mean))
        mean = {"task": mean[only], "general": mean[only]}
    s = isotonic(aggregate(mean["task"], mean["general"], beta=beta))
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
    on_cell: Callable[[int, int], None] | None = None,
) -> None:
    """`measure` on grids with clip search; arguments as on the command line."""
    texts = [Texts(name=name, source=file, task=True) for name, file in tasks.items()]
    texts += [Texts(name=name, source=file, task=False) for name, file in general.items()]
    grids = {bits: Grid(bits=bits, group_size=group_size, clip="mse") for bits in widths}
    measure(
        source,
        {bits: named(recipe, grid) for bits, grid in grids.items()},
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
    calibration = found.table.facts["calibration"]
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
        "predicted": {name: found.predicted("kl", name) for name in found.table.kl},
        "texts": calibration["texts"],
        "shares": calibration["shares"],
    }
    if found.task and found.general:
        rankings = [
            np.mean([found.table.kl[name][:, 0] for name in names], axis=0)
            for names in (found.task, found.general)
        ]
        if all(np.ptp(ranking) > 0 for ranking in rankings):
            tau, low, high = kendall_interval(*rankings, seed=0)
            result["tau"] = {"bits": found.table.bits[0], "tau": tau, "low": low, "high": high}
    return {**result, "page": str(write_allocation(out.with_suffix(".html"), found, result))}
