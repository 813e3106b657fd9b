"""Recipes: stages composed into what is done to every linear of a model.

    chain(OSAQ(eta=1e3), GPTQ(), CoordinateDescent(sweeps=4), grid=Grid(bits=2, group_size=64))

A stage (see `stages`) is a frozen dataclass of options. A `Surgery` rotates the model, a `Fold` changes a
whole block, a `Transform` maps `Problem -> Problem`, a `Rounding` maps `Problem -> Rounded`, a `Refinement`
maps `(Problem, Rounded) -> Rounded`, a `Finish` changes a whole block again; a chain has them in this order,
with one rounding and at most one surgery. A recipe is called with the problem of one layer, under `jit` and
`vmap` too; it is JSON and TOML both ways. Recipes with names are in `named`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp

from jaxquant.calibrate.moments import Mask
from jaxquant.errors import UsageError
from jaxquant.kinds import (
    Finish,
    Fold,
    Refinement,
    Rounding,
    Stage,
    Transform,
    required,
    stage_from_dict,
)
from jaxquant.methods import Problem, Rounded, layer_error
from jaxquant.models.config import EXACT, ModelConfig, Precision
from jaxquant.options import build, read_table, table_text
from jaxquant.places import Masked, check_pattern
from jaxquant.places import masked as masked  # recipes are made with it
from jaxquant.quant import Grid
from jaxquant.stages import FINE, GPTQ, QEP, RTN, Best, GroupBits, Keep, Refit
from jaxquant.surgery import Surgery

_S = TypeVar("_S", bound=Stage)

#: What stands for the curvature of the loss.
Hessian = Literal["input", "fisher"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A grid and a chain of stages; build it with `chain` or `named`.

    Attributes:
      grid: of the result.
      stages: a surgery, folds, transforms, one rounding, refinements, finishes.
      precision: what is quantized while the model runs, and while it is calibrated.
      true_sequential: linears of a block are calibrated with the block's earlier linears already quantized.
      hessian: `"input"`, `sum x x^T`; or `"fisher"`, the same with tokens weighted by the squared loss
        gradient at the layer's output (see `calibrate.fisher`).
      mask: tokens left out of the moments: `"none"`, the `"first"` of each window, or `"massive"` ones.
      rules: `(pattern, recipe)`: the first pattern found in a module's path replaces this recipe for it.
    """

    grid: Grid
    stages: tuple[Stage, ...]
    precision: Precision = EXACT
    true_sequential: bool = False
    hessian: Hessian = "input"
    mask: Mask = "none"
    rules: tuple[tuple[str, Recipe], ...] = ()

    def __post_init__(self) -> None:
        ranks = [_rank(stage) for stage in self.stages]
        if ranks != sorted(ranks) or ranks.count(_rank(RTN())) != 1:
            shown = ", ".join(map(str, self.stages)) or "nothing"
            raise UsageError(
                f"a chain is a surgery, folds, transforms, one rounding, refinements, finishes; got {shown}"
            )
        if self.keeps and len(self.stages) > 1 + len(self._of(Surgery)):
            shown = ", ".join(map(str, self.stages))
            raise UsageError(f"weights that are kept are not transformed or refined; got {shown}")
        if len(surgeries := self._of(Surgery)) > 1:
            raise UsageError(f"a model is rotated once; got {', '.join(map(str, surgeries))}")
        if surgeries and self.folds:
            raise UsageError(f"{self.folds[0]} scales inputs that {surgeries[0]} has rotated; leave one out")
        if self.folds and self.precision != EXACT:
            raise UsageError(
                f"{self.folds[0]} scales inputs after they were collected, quantized; leave precision out"
            )
        if self.folds and any(recipe.keeps for _, recipe in self.rules):
            raise UsageError(f"{self.folds[0]} scales whole blocks, kept linears too; leave one out")
        if self.folds and self.needs_gradients:
            raise UsageError(
                f"{self.folds[0]} scales outputs after their gradients were collected; leave one out"
            )
        if self.folds and self.needs_originals:
            raise UsageError(f"{self.folds[0]} scales inputs that QEP compares; leave one out")
        if self.finishes and self.needs_originals:
            raise UsageError(f"{self.finishes[0]} goes by weights that QEP moves away from; leave one out")
        if not isinstance(self.true_sequential, bool):
            raise UsageError(f"true_sequential must be true or false, got {self.true_sequential!r}")
        if self.precision.hidden_hadamard:
            raise UsageError("precision: hidden_hadamard comes with a surgery; leave it out")
        if self.folds and self.true_sequential:
            raise UsageError(
                f"{self.folds[0]} changes a block before it is rounded; leave true_sequential out"
            )
        if self.stores_order and any(isinstance(s, Refit) and s.passes > 1 for s in self.stages):
            raise UsageError(
                "refit with passes > 1 rounds anew on given grids: use static groups, or passes=1"
            )
        if any(isinstance(s.stage if isinstance(s, Masked) else s, GroupBits) for s in self.stages):
            self._check_group_bits()
        for position, best in enumerate(self.stages, start=1):
            if not isinstance(best, Best):
                continue
            behind = any(isinstance(stage, Best | Transform) for stage in self.stages[position:])
            if behind or any(isinstance(candidate, GroupBits | QEP) for candidate in best.candidates):
                raise UsageError(f"other transforms, QEP and bits by group go before: {best}")
        for field, kind in (("hessian", Hessian), ("mask", Mask)):
            if (value := getattr(self, field)) not in get_args(kind):
                raise UsageError(f"unknown {field} {value!r}; use {' or '.join(get_args(kind))}")
        whole = [
            recipe
            for _, recipe in self.rules
            if recipe.folds
            or recipe.surgery
            or recipe.finishes
            or recipe.true_sequential
            or recipe.precision != EXACT
        ]
        if whole or any((r.hessian, r.mask) != (self.hessian, self.mask) for _, r in self.rules):
            raise UsageError(
                "surgeries, folds, finishes, precision, true_sequential, hessian and mask concern whole "
                "blocks; give them to the default recipe (hessian and mask to the rules as well)"
            )

    def __call__(self, problem: Problem) -> Rounded:
        """The rounded layer, `stats.error` against `problem.target` (a lone rounding's against `weight`).

        Folds, finishes, masked stages and rules need a place in a model: call `recipe.at(path)` first.
        """
        return _compiled(self.stages, problem)

    @property
    def surgery(self) -> Surgery | None:
        """The stage that rotates the model, if there is one; `at` leaves it out."""
        return next(iter(self._of(Surgery)), None)

    @property
    def keeps(self) -> bool:
        """Whether weights stay in floating point; rules may say otherwise for some."""
        return bool(self._of(Keep))

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The stages that change whole blocks; `at` leaves them out."""
        return self._of(Fold)

    @property
    def finishes(self) -> tuple[Finish, ...]:
        """The stages that change whole blocks once they are rounded; `at` leaves them out."""
        return self._of(Finish)

    @property
    def mixes_groups(self) -> bool:
        """Whether groups of a linear differ in bits."""
        return self._has(GroupBits)

    def stored_bytes(self, rows: int, columns: int, *, where: str = "weight") -> float:
        """Bytes of a linear `[rows, columns]`, scales, zeros and orders included; where groups mix, at most.

        Raises:
          UsageError: the group size does not divide `rows`; names `where`.
        """
        if self.keeps:
            return 2.0 * rows * columns
        groups = self.grid.groups(rows, where=where)
        orders = 4 * rows * self.stores_order + 4 * groups * self.mixes_groups
        return self.grid.effective_bits(rows) / 8 * rows * columns + orders

    def runtime(self, config: ModelConfig) -> ModelConfig:
        """The config of the quantized model.

        Raises:
          UsageError: groups of activations do not divide the channels.
        """
        precision = self.precision
        if self.surgery is not None:
            precision = dataclasses.replace(precision, hidden_hadamard=self.surgery.hidden_block(config))
            config = dataclasses.replace(config, tie_embeddings=False)
        precision.check(config)
        return dataclasses.replace(config, precision=precision)

    def _check_group_bits(self) -> None:
        grid = self.grid
        if grid.group_size is None or grid.symmetric or not 2 <= grid.bits <= 7 or self.stores_order:
            raise UsageError(
                f"bits by group need an asymmetric grid of 2 to 7 bits with static groups; got {self}"
            )

    def _of(self, kind: type[_S]) -> tuple[_S, ...]:
        return tuple(stage for stage in self.stages if isinstance(stage, kind))

    def _has(self, kind: type[Stage]) -> bool:
        """Whether a stage of the kind is here, masked or not, or in the rules."""
        stages = (stage.stage if isinstance(stage, Masked) else stage for stage in self.stages)
        return any(isinstance(s, kind) for s in stages) or any(r._has(kind) for _, r in self.rules)

    @property
    def options(self) -> list[str]:
        """What `stats.choices` counts: "off" and the candidates of the `Best` stage; empty without one."""
        return [o for best in self._of(Best) for o in ("off", *map(str, best.candidates))]

    @property
    def needs_gradients(self) -> bool:
        """Whether a stage weighs errors by gradients at the outputs of linears."""
        return self._has(FINE)

    @property
    def needs_originals(self) -> bool:
        """Whether a stage compares the inputs of linears with those of the original model."""
        return self._has(QEP)

    @property
    def stores_order(self) -> bool:
        """Whether packed weights carry `order`: dynamic groups of inputs in order of activation."""
        orders = [s for s in self.stages if isinstance(s, GPTQ) and s.act_order and s.groups == "dynamic"]
        return bool(orders) and self.grid.group_size is not None

    def at(self, path: str) -> Recipe:
        """What happens to the module at `path` (`blocks.3.mlp.down`) alone: rules and masks are resolved."""
        for pattern, recipe in self.rules:
            if re.search(pattern, path):
                return recipe.at(path)
        kept = []
        for stage in self.stages:
            if isinstance(stage, (Surgery, Fold, Finish)):
                continue
            if not isinstance(stage, Masked):
                kept.append(stage)
            elif re.search(stage.pattern, path):
                kept.append(stage.stage)
        return dataclasses.replace(self, stages=tuple(kept), precision=EXACT, rules=())

    def __str__(self) -> str:
        parts = [" + ".join(map(str, self.stages)), *([] if self.keeps else [str(self.grid)])]
        if self.precision != EXACT:
            parts.append(str(self.precision))
        if self.true_sequential:
            parts.append("true-sequential")
        if self.hessian != "input":
            parts.append(f"{self.hessian} Hessian")
        if self.mask != "none":
            parts.append(f"without {self.mask} tokens")
        parts += [f"[{pattern}: {recipe}]" for pattern, recipe in self.rules]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        return {
            "grid": self.grid.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "precision": self.precision.to_dict(),
            "true_sequential": self.true_sequential,
            "hessian": self.hessian,
            "mask": self.mask,
            "rules": [{"pattern": pattern, "recipe": recipe.to_dict()} for pattern, recipe in self.rules],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote; missing fields keep their defaults.

        Raises:
          UsageError: unknown stages or options.
        """
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UsageError(f"unknown recipe fields {', '.join(sorted(unknown))}")
        return cls(
            grid=build(Grid, "grid", fields.get("grid", {})),
            stages=tuple(stage_from_dict(stage) for stage in fields.get("stages", ())),
            precision=Precision.from_dict(fields.get("precision", {})),
            **{name: fields[name] for name in ("true_sequential", "hessian", "mask") if name in fields},
            rules=tuple(
                (check_pattern(required(r, "pattern", "rule")), cls.from_dict(required(r, "recipe", "rule")))
                for r in fields.get("rules", ())
            ),
        )


def to_toml(recipe: Recipe) -> str:
    """`recipe` as the text of a file that `read_toml` reads and people edit."""
    return table_text(recipe.to_dict())


def read_toml(path: Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
      InputError: the file is missing or no TOML.
      UsageError: unknown stages or options.
    """
    return Recipe.from_dict(read_table(path, missing="give the name of a recipe or a .toml file"))


def chain(
    *stages: Stage,
    grid: Grid,
    precision: Precision = EXACT,
    true_sequential: bool = False,
    hessian: Hessian = "input",
    mask: Mask = "none",
) -> Recipe:
    """Stages one after another, in the order of their kinds; for them and the options see `Recipe`.

    Raises:
      UsageError: another order, no rounding or more than one, or stages and options that exclude each other.
    """
    return Recipe(
        grid=grid,
        stages=stages,
        precision=precision,
        true_sequential=true_sequential,
        hessian=hessian,
        mask=mask,
    )


def by_path(rules: Mapping[str, Recipe], default: Recipe) -> Recipe:
    """`default`, except where a regular expression is found in the module's path; the first match counts."""
    for pattern in rules:
        check_pattern(pattern)
    return dataclasses.replace(default, rules=(*rules.items(), *default.rules))


def _run(stages: tuple[Stage, ...], problem: Problem, rounded: Rounded | None = None) -> Rounded:
    moved = False
    for position, stage in enumerate(stages):
        if isinstance(stage, Transform):
            problem, moved = stage(problem), True
        elif isinstance(stage, Best):
            behind = stages[position + 1 :]
            alone = tuple(itertools.takewhile(_keeps_columns_apart, behind))
            problem, rounded = stage.round(problem, functools.partial(_run, alone))
            return _run(behind[len(alone) :], problem, rounded)
        elif isinstance(stage, Rounding):
            rounded = stage(problem)
            rounded = _against_target(problem, rounded) if moved else rounded
        elif isinstance(stage, Refinement) and rounded is not None:
            rounded = stage(problem, rounded)
        else:
            raise UsageError(f"{stage} depends on the place in a model; call recipe.at(path) first")
    assert rounded is not None
    return rounded


_compiled = jax.jit(_run, static_argnums=0)


def _keeps_columns_apart(stage: Stage) -> bool:
    return not (isinstance(stage, Refinement) and stage.couples_columns)


def _against_target(problem: Problem, rounded: Rounded) -> Rounded:
    """`rounded` with its error measured against `problem.target`, which transforms have moved away from."""
    values = rounded.values(problem.moments.second.dtype)
    error = layer_error(values, problem.target.astype(values.dtype), problem.moments.second)
    finite = rounded.stats.finite & jnp.all(jnp.isfinite(problem.target))
    return dataclasses.replace(rounded, stats=dataclasses.replace(rounded.stats, error=error, finite=finite))


def _rank(stage: Stage) -> int:
    """Place in a chain: surgeries, folds, transforms, roundings, refinements, finishes."""
    stage = stage.stage if isinstance(stage, Masked) else stage
    for rank, kind in enumerate((Surgery, Fold, (Transform, Best), Rounding, Refinement, Finish)):
        if isinstance(stage, kind):
            return rank
    raise UsageError(f"{stage!r} is no stage: derive it from Transform, Rounding or Refinement")
