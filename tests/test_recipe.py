"""Recipes: composition, paths, files."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate.moments import observe
from jaxquant.errors import InputError, UsageError
from jaxquant.methods import Problem, Rounded, gptq, layer_error, rtn
from jaxquant.named import NAMES, named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, by_path, chain, masked, read_toml, to_toml
from jaxquant.stages import (
    AWQ,
    GPTQ,
    OSAQ,
    QEP,
    RTN,
    Best,
    CoordinateDescent,
    GroupBits,
    MagR,
    Refinement,
    Refit,
    Transform,
    Tune,
    register,
)

GRID = Grid(bits=3, group_size=16, clip="mse")


@register("test-shrink")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(Transform):
    factor: float = 0.9

    def __call__(self, problem: Problem) -> Problem:
        return dataclasses.replace(problem, weight=self.factor * problem.weight)


@dataclasses.dataclass(frozen=True)
class Nothing(Refinement):
    def __call__(self, problem: Problem, rounded: Rounded) -> Rounded:
        return rounded


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 32)) @ (rng.normal(size=(32, 32)) * np.exp(-np.arange(32) / 8)[:, None])
    return jnp.asarray(rng.normal(size=(32, 12)), jnp.float32), observe(jnp.asarray(x, jnp.float32))


def assert_same(a: Rounded, b: Rounded) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_named_recipes_are_the_strong_forms(layer):
    problem = Problem.of(*layer, GRID)
    assert_same(named("rtn", GRID)(problem), rtn(*layer, GRID))
    assert_same(
        named("gptq", GRID)(problem), gptq(*layer, GRID, act_order=True, groups="static", percdamp=0.01)
    )
    assert str(named("gptq", GRID)) == (
        "GPTQ (act-order, static groups, damping 0.01), W3 g16 asymmetric, mse clip search"
    )


def test_errors_are_against_the_original_weight(layer):
    weight, moments = layer
    rounded = chain(Shrink(factor=0.5), RTN(), Nothing(), grid=GRID)(Problem.of(weight, moments, GRID))
    assert_same(
        dataclasses.replace(rounded, stats=None),
        dataclasses.replace(rtn(0.5 * weight, moments, GRID), stats=None),
    )
    expected = jax.jit(lambda r: layer_error(r.pack().dequantize(), weight, moments.second))(rounded)
    assert rounded.stats.error == pytest.approx(float(expected), rel=1e-5)
    assert rounded.stats.error > 0.1  # half of the weight is gone


def test_recipes_run_under_jit_and_vmap(layer):
    weight, moments = layer
    recipe = chain(Shrink(), GPTQ(), Nothing(), grid=GRID)
    weights = jnp.stack([weight, 2 * weight, -weight])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, leaf]), moments)
    together = jax.vmap(lambda w, m: recipe(Problem.of(w, m, GRID)))(weights, stacked)
    for i in range(3):
        one = jax.jit(recipe)(Problem.of(weights[i], moments, GRID))
        np.testing.assert_array_equal(together.codes[i], one.codes)
        np.testing.assert_allclose(together.stats.error[i], one.stats.error, rtol=1e-4)


@pytest.mark.parametrize(
    "stages",
    [(), (GPTQ(), RTN()), (GPTQ(), Shrink()), (Nothing(), RTN()), (Shrink(),), (Shrink(), AWQ(), RTN())],
)
def test_other_orders_are_refused(stages):
    with pytest.raises(UsageError, match="folds, transforms, one rounding, refinements"):
        chain(*stages, grid=GRID)


@dataclasses.dataclass(frozen=True)
class HalfTheLayer(Transform):
    """Better for even columns, ruin for odd ones."""

    def __call__(self, problem: Problem) -> Problem:
        even = (jnp.arange(problem.weight.shape[1]) % 2 == 0)[None]
        return dataclasses.replace(problem, weight=jnp.where(even, problem.target, 0.1 * problem.weight))


@pytest.mark.parametrize("rounding", [RTN(), GPTQ(), GPTQ(groups="dynamic")])
def test_every_column_takes_the_best_of_its_roundings(rounding, layer):
    weight, moments = layer
    problem = dataclasses.replace(Problem.of(weight, moments, GRID), weight=1.3 * weight)
    candidates = (HalfTheLayer(), Shrink(factor=0.75))
    chosen = chain(Best(candidates), rounding, grid=GRID)(problem)

    h = np.asarray(moments.second, np.float64)
    every = [
        np.asarray(chain(*stages, rounding, grid=GRID)(problem).values(), np.float64)
        for stages in ((), *((candidate,) for candidate in candidates))
    ]
    errors = np.stack([np.sum((q - weight) * (h @ (q - weight)), axis=0) for q in every])
    took = np.argmin(errors, axis=0)
    expected = np.choose(took[None, :], every)
    np.testing.assert_allclose(chosen.values(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(chosen.stats.choices, np.bincount(took, minlength=3))
    total = float(np.sum(weight * (h @ weight)))
    assert len(set(took)) > 1
    assert float(chosen.stats.error) == pytest.approx(errors.min(axis=0).sum() / total, rel=1e-4)


def test_refinements_that_couple_columns_follow_the_choice(layer):
    @dataclasses.dataclass(frozen=True)
    class Whole(Refinement):
        couples_columns: ClassVar[bool] = True

        def __call__(self, problem: Problem, rounded: Rounded) -> Rounded:
            assert problem.weight.shape == problem.target.shape == rounded.codes.shape == layer[0].shape
            return dataclasses.replace(rounded, codes=jnp.zeros_like(rounded.codes))

    problem = Problem.of(*layer, GRID)
    stages = (Best((HalfTheLayer(),)), GPTQ(), CoordinateDescent())
    before = chain(*stages, grid=GRID)(problem)
    after = chain(*stages, Whole(), grid=GRID)(problem)
    assert not after.codes.any()
    np.testing.assert_array_equal(after.scale, before.scale)
    np.testing.assert_array_equal(after.stats.choices, before.stats.choices)


@pytest.mark.parametrize(
    "name",
    ["magr-gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("osaq-gptq", "osaq-dagger"))],
)
def test_transforms_and_refinements_run_under_vmap(name, layer):
    weight, moments = layer
    recipe = named(name, GRID)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), Problem.of(weight, moments, GRID))
    together = jax.vmap(recipe)(stack)
    one = recipe(Problem.of(weight, moments, GRID))
    assert np.mean(np.asarray(together.codes[1]) != np.asarray(one.codes)) < 0.01
    np.testing.assert_allclose(together.stats.error[0], one.stats.error, rtol=0.02)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compilers for other devices plan differently")
@pytest.mark.parametrize("shape", [(1024, 1024), (512, 1536)])
def test_a_choice_takes_less_memory_than_another_solve(shape):
    """Compiled, not run: what the second rounding and its step need besides what GPTQ needs alone."""
    weight, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (1024, shape[0])))
    grid = Grid(bits=2, group_size=64, clip="mse")
    problem = jax.eval_shape(lambda w, x: Problem.of(w, observe(x), grid), weight, x)
    alone, chosen = (
        jax.jit(named(name, grid)).lower(problem).compile().memory_analysis().temp_size_in_bytes
        for name in ("gptq", "osaq-gptq")
    )
    assert chosen < 1.8 * alone


@pytest.mark.slow
def test_tries_in_turn_are_those_side_by_side():
    """A layer so wide that they take turns, and some of its columns alone, where they do not."""
    x = jax.random.normal(jax.random.key(0), (256, 128)) @ jax.random.normal(jax.random.key(1), (128, 128))
    weight, moments = jax.random.normal(jax.random.key(2), (128, 2048)), observe(x)
    recipe = chain(Best((Shrink(factor=0.99), OSAQ(eta=300.0))), GPTQ(), grid=GRID)

    def takes_turns(problem):
        tries = f"f32[3,{','.join(map(str, problem.weight.shape))}]"
        return tries in str(jax.make_jaxpr(recipe)(problem))

    whole, part = (Problem.of(w, moments, GRID) for w in (weight, weight[:, -128:]))
    assert takes_turns(whole)
    assert not takes_turns(part)
    turns, beside = recipe(whole), recipe(part)
    assert np.mean(np.asarray(turns.codes[:, -128:]) == np.asarray(beside.codes)) > 0.999
    assert np.mean(np.isclose(turns.scale[:, -128:], beside.scale, rtol=2e-3)) > 0.999
    assert np.mean(np.isclose(turns.zero[:, -128:], beside.zero)) > 0.999
    error = layer_error(turns.values(), weight, moments.second)
    np.testing.assert_allclose(turns.stats.error, error, rtol=1e-4)
    assert turns.stats.error < gptq(weight, moments, GRID).stats.error
    assert turns.stats.choices.shape == (3,)
    assert turns.stats.choices.sum() == 2048
    assert turns.stats.choices.min() > 0
    assert turns.stats.attempts.shape == turns.stats.fallback.shape == ()
    assert not recipe(Problem.of(weight.at[0, 0].set(jnp.nan), moments, GRID)).stats.finite


def test_a_choice_takes_half_precision_weights(layer):
    weight, moments = layer
    recipe = chain(Best((Shrink(factor=0.98), MagR())), RTN(), grid=GRID)
    rounded = recipe(Problem.of(weight.astype(jnp.bfloat16), moments, GRID))
    assert float(rounded.stats.error) <= float(rtn(weight.astype(jnp.bfloat16), moments, GRID).stats.error)


def test_coordinate_descent_lowers_the_error(layer):
    problem = Problem.of(*layer, GRID)
    before, after = (
        chain(*stages, grid=GRID)(problem) for stages in ((GPTQ(),), (GPTQ(), CoordinateDescent()))
    )
    assert after.stats.error < before.stats.error


def test_folds_need_a_block():
    recipe = chain(AWQ(), GPTQ(), grid=GRID)
    assert recipe.folds == (AWQ(),)
    assert recipe.at("blocks.0.attn.q").stages == (GPTQ(),)
    with pytest.raises(
        UsageError, match="AWQ changes a block before it is rounded; leave true_sequential out"
    ):
        chain(AWQ(), RTN(), grid=GRID, true_sequential=True)
    with pytest.raises(UsageError, match="AWQ changes a whole block and cannot be masked"):
        masked(AWQ(), "attn")
    with pytest.raises(UsageError, match="give them to the default recipe"):
        by_path({"mlp": recipe}, named("rtn", GRID))


def test_what_is_no_stage_is_refused():
    with pytest.raises(UsageError, match="is no stage: derive it from"):
        chain(lambda problem: problem, grid=GRID)  # pyright: ignore


def test_rules_and_masks_are_resolved_by_path():
    coarse = named("rtn", Grid(bits=2, group_size=16))
    recipe = by_path({r"\.down$": coarse, r"blocks\.0\.": named("rtn", Grid(bits=8))}, named("gptq", GRID))
    assert recipe.at("blocks.0.mlp.down").grid.bits == 2
    assert recipe.at("blocks.0.attn.q").grid.bits == 8
    assert recipe.at("blocks.1.attn.q").stages == (GPTQ(),)
    chained = chain(masked(Shrink(), "attn"), RTN(), grid=GRID)
    assert chained.at("blocks.0.attn.q").stages == (Shrink(), RTN())
    assert chained.at("blocks.0.mlp.up").stages == (RTN(),)


def test_a_mask_needs_a_path(layer):
    with pytest.raises(UsageError, match=r"depends on the place in a model; call recipe\.at\(path\) first"):
        chain(masked(Shrink(), "attn"), RTN(), grid=GRID)(Problem.of(*layer, GRID))


def test_patterns_are_checked():
    with pytest.raises(UsageError, match="is no regular expression"):
        masked(Shrink(), "(")
    with pytest.raises(UsageError, match="is no regular expression"):
        by_path({"(": named("rtn", GRID)}, named("rtn", GRID))


def test_what_has_to_be_several_is_asked_for_as_a_tuple():
    with pytest.raises(UsageError, match="give a tuple of transforms"):
        Best(OSAQ())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="is no tuple of shares"):
        GroupBits(shares=0.25)  # pyright: ignore[reportArgumentType]


RECIPES = [
    *(named(name, GRID) for name in NAMES),
    named("gptq", Grid(bits=2, symmetric=True, convention="full"), true_sequential=True),
    chain(GPTQ(), grid=GRID, hessian="fisher", mask="massive"),
    by_path(
        {r"mlp\.": named("rtn", Grid(bits=8))}, chain(masked(Shrink(factor=0.7), "attn"), GPTQ(), grid=GRID)
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_json_and_toml_round_trips(recipe, tmp_path):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert read_toml(tmp_path / "r.toml") == recipe


@pytest.mark.parametrize(("text", "error", "message"), [
    (None, InputError, r"r\.toml: No such file"),
    ("grid = {", InputError, "is no TOML file"),
    ('stages = [{ stage = "gtpq" }]', UsageError, r"unknown stage 'gtpq'; there are .*gptq"),
    ('stages = [{ stage = "gptq", damp = 1 }]', UsageError,
     "gptq: unknown options damp; there are act_order, groups, percdamp"),
    ('hessian = "fish"\nstages = [{ stage = "rtn" }]', UsageError,
     "unknown hessian 'fish'; use input or fisher"),
    ('stages = [{ stage = "best" }]', UsageError, "best: candidates is missing"),
    ('stages = [{ stage = "rtn" }]\nrules = [{ pattern = "x" }]', UsageError, "rule: recipe is missing"),
    ("bits = 3", UsageError, "unknown recipe fields bits"),
])  # fmt: skip
def test_bad_files_name_the_place(tmp_path, text, error, message):
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message):
        read_toml(path)


def test_unregistered_stages_cannot_be_saved():
    with pytest.raises(UsageError, match=r"Nothing cannot be saved; decorate the class with @register"):
        chain(RTN(), Nothing(), grid=GRID).to_dict()

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Smaller(Shrink):
        pass

    with pytest.raises(UsageError, match=r"Smaller cannot be saved; decorate the class with @register"):
        Smaller().to_dict()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ('{ stage = "osaq", eta = "300" }', "osaq: eta must be float, got '300'"),
        ('{ stage = "osaq", support = 2.5 }', r"osaq: support must be int \| None, got 2.5"),
        ('{ stage = "osaq", eta = true }', "osaq: eta must be float, got True"),
        ('{ stage = "gptq", act_order = "no" }', "gptq: act_order must be bool, got 'no'"),
        ('{ stage = "gptq", groups = 3 }', "unknown groups 3"),
        ('{ stage = ["rtn"] }', r"unknown stage \['rtn'\]"),
        ('"rtn"', "a stage is a table, .* got 'rtn'"),
        ('{ stage = "masked", pattern = 3, of = { stage = "rtn" } }', "3 is no regular expression"),
        ('{ stage = "rtn" }]\ntrue_sequential = "no"\nrules = [', "true_sequential must be true or false"),
    ],
)
def test_options_of_another_type_are_refused(stage, message, tmp_path):
    (tmp_path / "r.toml").write_text(f"stages = [{stage}]")
    with pytest.raises(UsageError, match=message):
        read_toml(tmp_path / "r.toml")


def test_an_infinite_option_is_saved(tmp_path):
    recipe = chain(OSAQ(eta=100, tau=float("inf")), RTN(), grid=GRID)
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert read_toml(tmp_path / "r.toml") == recipe


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown recipe 'gtpq'; use one of rtn, gptq, gptq-refit"):
        named("gtpq", GRID)
    with pytest.raises(UsageError, match=r"percdamp=0.0 must be positive"):
        GPTQ(percdamp=0.0)
    with pytest.raises(UsageError, match="unknown groups 'none'"):
        GPTQ(groups="none")  # pyright: ignore


def test_impossible_options_of_stages_are_refused():
    with pytest.raises(UsageError, match="percdamp positive"):
        Refit(percdamp=0.0)
    for wrong in (GPTQ(), masked(OSAQ(), "down")):
        with pytest.raises(UsageError, match="is no change of the weight"):
            Best((wrong,))  # pyright: ignore[reportArgumentType]
    for stages in (
        (Best((OSAQ(),)), Best((OSAQ(),))),
        (Best((OSAQ(),)), GroupBits()),
        (Best((GroupBits(),)),),
        (Best((QEP(),)),),
        (Best((OSAQ(),)), QEP()),
        (Best((OSAQ(),)), MagR()),
    ):
        with pytest.raises(UsageError, match=r"other transforms, QEP and bits by group go before: by column"):
            chain(*stages, GPTQ(), grid=GRID)
    with pytest.raises(UsageError, match="candidates need different names"):
        Best((MagR(), MagR()))
    with pytest.raises(UsageError, match=r"tuned scales .* goes by weights that QEP moves away from"):
        chain(QEP(), GPTQ(), Tune(), grid=GRID)
    with pytest.raises(UsageError, match=r"alpha=-0.001 .* must not be negative"):
        MagR(alpha=-1e-3)
    with pytest.raises(UsageError, match="unknown form 'Soft'"):
        OSAQ(form="Soft")
    for wrong in ({"tau": 0.0}, {"eta": -5.0}, {"eta": float("nan")}, {"support": 0}):
        with pytest.raises(UsageError, match="must be positive"):
            OSAQ(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="sweeps=-1 is negative"):
        CoordinateDescent(sweeps=-1)
    with pytest.raises(UsageError, match="steps=0 must be positive"):
        AWQ(steps=0)
    with pytest.raises(UsageError, match="use static groups, or passes=1"):
        chain(GPTQ(groups="dynamic"), Refit(), grid=GRID)
    chain(GPTQ(groups="dynamic"), Refit(passes=1), grid=GRID)


def test_a_candidate_that_fails_is_not_chosen(layer):
    @dataclasses.dataclass(frozen=True)
    class Broken(Transform):
        def __call__(self, problem):
            return dataclasses.replace(problem, weight=problem.weight.at[3, 1:].set(jnp.nan))

    rounded = chain(Best((Broken(),)), GPTQ(), grid=GRID)(Problem.of(*layer, GRID))
    assert rounded.stats.choices.tolist() == [layer[0].shape[1], 0]
    assert bool(rounded.stats.finite)
    np.testing.assert_array_equal(rounded.codes, gptq(*layer, GRID).codes)

    @dataclasses.dataclass(frozen=True)
    class Huge(Transform):
        def __call__(self, problem):
            return dataclasses.replace(problem, weight=problem.weight.at[:, :3].multiply(1e25))

    wide = dataclasses.replace(GRID, scale_dtype="float32")
    rounded = chain(Best((Huge(),)), RTN(), grid=wide)(Problem.of(*layer, wide))
    np.testing.assert_array_equal(rounded.codes, rtn(*layer, wide).codes)
    assert jnp.isfinite(rounded.stats.error)
    unknown = dataclasses.replace(Problem.of(*layer, GRID), target=layer[0].at[3, 4].set(jnp.nan))
    assert not chain(Best((Shrink(),)), RTN(), grid=GRID)(unknown).stats.finite


def test_a_finish_comes_last_and_concerns_whole_blocks(tmp_path):
    recipe = chain(GPTQ(), Tune(steps=7, weight=0.0), grid=GRID)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert read_toml(tmp_path / "recipe.toml") == recipe
    assert recipe.at("blocks.0.attn.q").stages == (GPTQ(),)
    assert str(recipe).startswith("GPTQ (act-order, static groups, damping 0.01) + tuned scales (weight 0, 7")
    with pytest.raises(UsageError, match="one rounding, refinements, finishes; got"):
        chain(Tune(), GPTQ(), grid=GRID)
    with pytest.raises(UsageError, match="changes a whole block and cannot be masked"):
        masked(Tune(), "q")
    with pytest.raises(UsageError, match="folds, finishes, precision"):
        by_path({"q": recipe}, chain(GPTQ(), grid=GRID))
    with pytest.raises(UsageError, match="weight and steps must not be negative"):
        Tune(steps=-1)
