"""Training: it learns, in parts as in one, and goes on after a kill to the same bits."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG

from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.smoothness import substituted
from jaxquant.train import State, Training, layer_loss, merge, split, train, train_step
from jaxquant.train.loop import METRICS

# Every other set of options is compiled anew.
OPTIONS = Training(steps=24, batch=4, save_every=9, learning_rate=0.02, smooth_share=1.0, smooth_warmup=0.25)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (10, 16), 0, 64), np.int32)


@pytest.fixture(scope="module")
def outputs():
    """Gradients in few directions, in which the errors of a row of the weight can cancel."""
    g = jax.random.normal(jax.random.key(2), (3, 4, 32))
    return {path: jnp.einsum("lti,ltj->lij", g, g) for path in ("mlp.down", "attn.q")}


@pytest.fixture(scope="module")
def runs(student, teacher, tokens, outputs):
    """Of every smoothness loss: the rows of its run, and the parameters after it."""
    found = {}
    for smoothness in ("none", "gradient", "neighborhood", "layer", "substitution"):
        rows, options = [], dataclasses.replace(OPTIONS, smoothness=smoothness)
        result = train(student, teacher, tokens, options, outputs=outputs, on_event=rows.append)
        found[smoothness] = rows, result
    return found


@pytest.mark.slow
@pytest.mark.parametrize("smoothness", ["none", "gradient", "neighborhood", "substitution"])
def test_every_loss_falls(runs, smoothness):
    rows, _ = runs[smoothness]
    assert [row["step"] for row in rows] == list(range(1, 25))
    first, last = (
        {key: np.mean([row[key] for row in part]) for key in ("kl", "hidden", "smooth")}
        for part in (rows[:4], rows[-4:])
    )
    assert last["kl"] < 0.7 * first["kl"]
    assert last["hidden"] < 0.8 * first["hidden"]
    has_term = smoothness in ("gradient", "neighborhood")
    assert (last["smooth"] < 0.9 * first["smooth"]) == has_term


@pytest.mark.slow
def test_the_layer_loss_falls_where_errors_can_cancel(runs, student, teacher, outputs):
    before, plain, felt = (
        float(layer_loss((params, CONFIG), teacher, outputs))
        for params in (student[0], runs["none"][1], runs["layer"][1])
    )
    assert felt < 0.8 * before
    assert felt < 0.8 * plain


@pytest.mark.slow
def test_the_smoothness_term_rises_over_the_first_steps(runs):
    shares = [(row["loss"] - row["kl"] - row["hidden"]) / row["kl"] for row in runs["gradient"][0]]
    expected = np.minimum(np.arange(1, 25) / 6, 1)
    np.testing.assert_allclose(shares, expected, rtol=1e-3)


@pytest.mark.slow
def test_parts_of_a_batch_add_up(student, teacher, tokens):
    trained, rest = split(student[0])
    results = []
    for accumulate in (1, 4):
        options = dataclasses.replace(OPTIONS, accumulate=accumulate)
        state = jax.tree.map(jnp.copy, State.start(trained, options))
        results.append(
            train_step(
                state, rest, teacher[0], jnp.asarray(tokens[:4]),
                config=CONFIG, teacher_config=CONFIG, options=options,
            )
        )  # fmt: skip
    (_, whole), (_, parts) = results
    for name in ("loss", "kl", "hidden", "gradient_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4)


@pytest.mark.slow
def test_substitution_trains_on_neighbours_of_the_text_more_and_more(student, teacher, tokens):
    """The losses of a first step are those of distillation on the neighbours that the step draws."""
    trained, rest = split(student[0])
    fixed = {"config": CONFIG, "teacher_config": CONFIG}

    def first_step(options, tokens):
        state = jax.tree.map(jnp.copy, State.start(trained, options))
        return train_step(state, rest, teacher[0], jnp.asarray(tokens), **fixed, options=options)[1]

    options = dataclasses.replace(OPTIONS, smoothness="substitution", substituted=1.0, smooth_warmup=0.0)
    (part,) = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 0), 1)
    drawn = substituted(teacher[0]["embed"], jnp.asarray(tokens[:4]), jax.random.split(part)[0], share=1.0)
    found, expected = first_step(options, tokens[:4]), first_step(OPTIONS, drawn)
    for name in ("loss", "kl", "hidden"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    # With a warm-up of all 24 steps, one token in 24 is replaced at first.
    little = dataclasses.replace(options, smooth_warmup=1.0)
    plain = first_step(OPTIONS, tokens[:4])
    assert abs(first_step(little, tokens[:4])["kl"] - plain["kl"]) < abs(found["kl"] - plain["kl"])


@pytest.mark.parametrize("smoothness", [pytest.param("neighborhood", marks=pytest.mark.slow), "substitution"])
def test_a_killed_run_goes_on_to_the_same_bits(student, teacher, tokens, tmp_path, smoothness):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["step"] == 14:
            raise KilledError

    options = dataclasses.replace(OPTIONS, smoothness=smoothness)
    whole = train(student, teacher, tokens, options, folder=tmp_path / "whole")
    with pytest.raises(KilledError):
        train(student, teacher, tokens, options, folder=tmp_path / "parts", on_event=kill)
    with (tmp_path / "parts" / METRICS).open("a") as lines:
        lines.write('{"step": 15, "lo')  # what a kill may leave
    (tmp_path / "parts" / "state-00000018.orbax-checkpoint-tmp").mkdir()
    events = []
    parts = train(student, teacher, tokens, options, folder=tmp_path / "parts", on_event=events.append)
    assert events[0] == {"event": "resume", "step": 9, "steps": 24}
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [
        [json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    kept = [[{k: v for k, v in row.items() if k != "seconds"} for row in lines] for lines in rows]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 24
    assert [path.name for path in (tmp_path / "parts").glob("state-*")] == ["state-00000024"]
    with pytest.raises(UsageError, match="is the state of another run"):
        train(student, teacher, tokens, dataclasses.replace(options, steps=5), folder=tmp_path / "parts")
    with pytest.raises(UsageError, match="is the state of another run"):
        train(student, teacher, tokens[::-1], options, folder=tmp_path / "parts")


@pytest.mark.slow
def test_what_is_not_trained_stays(runs, student):
    (moved, rest), (before, kept) = split(runs["none"][1]), split(student[0])
    for one, other in zip(jax.tree.leaves(rest), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(
        bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True)
    )


def test_losses_that_are_not_finite_are_named_with_their_step(student, teacher, tokens):
    broken = {**teacher[0], "norm": teacher[0]["norm"] * jnp.nan}
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan .* smaller learning_rate"):
        train(student, (broken, CONFIG), tokens, OPTIONS)


def test_bad_options_are_refused(student, teacher, tokens):
    for change, message in (
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"accumulate": 3}, "batch=4 cannot be computed in accumulate=3 parts"),
        ({"smoothness": "sharp"}, "unknown smoothness 'sharp'; use one of none, gradient"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"warmup": 1.5}, "warmup=1.5: must be a share of the steps"),
        ({"substituted": -0.1}, "substituted=-0.1: must be a share of the tokens"),
        ({"smooth_share": float("nan")}, "smooth_share=nan: must be a number of at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(OPTIONS, **change)
    with pytest.raises(UsageError, match="2 windows for batch=4"):
        train(student, teacher, tokens[:2], OPTIONS)
    with pytest.raises(UsageError, match="the layer loss needs moments"):
        train(student, teacher, tokens, dataclasses.replace(OPTIONS, smoothness="layer"))


def test_every_step_moves_something_and_the_rate_rises_and_falls():
    for warmup in (0.0, 0.25, 1.0):
        optimizer = dataclasses.replace(OPTIONS, warmup=warmup).optimizer()
        place = jnp.ones(1)
        state, moves = optimizer.init(place), []
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(OPTIONS.steps):
                update, state = optimizer.update(jnp.ones(1), state, place)
                moves.append(-float(update[0]))
        peak = int(np.argmax(moves))
        assert min(moves) > 0
        assert max(moves) == pytest.approx(OPTIONS.learning_rate, rel=1e-3)
        assert peak == max(round(warmup * OPTIONS.steps) - 1, 0)
        assert moves[: peak + 1] == sorted(moves[: peak + 1])
        assert moves[peak:] == sorted(moves[peak:], reverse=True)


def test_merge_undoes_split(student):
    trained, rest = split(student[0])
    for one, other in zip(jax.tree.leaves(merge(trained, rest)), jax.tree.leaves(student[0]), strict=True):
        assert one is other
