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
from jaxquant.models import decoder
from jaxquant.quant import Grid
from jaxquant.train import State, Training, latent_params, layer_loss, merge, split, train, train_step
from jaxquant.train.loop import METRICS

GRID = Grid(bits=2, group_size=16, clip="mse")
OPTIONS = Training(steps=8, batch=4, save_every=3, learning_rate=0.02)


@pytest.fixture(scope="module")
def teacher():
    return decoder.init_params(jax.random.key(0), CONFIG), CONFIG


@pytest.fixture(scope="module")
def student(teacher):
    return latent_params(teacher[0], GRID), CONFIG


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (10, 16), 0, 64), np.int32)


@pytest.fixture(scope="module")
def outputs():
    """Gradients in few directions, in which the errors of a row of the weight can cancel."""
    g = jax.random.normal(jax.random.key(2), (3, 4, 32))
    return {path: jnp.einsum("lti,ltj->lij", g, g) for path in ("mlp.down", "attn.q")}


@pytest.mark.parametrize("smoothness", ["none", "gradient", "neighborhood"])
def test_every_loss_falls(student, teacher, tokens, smoothness):
    options = dataclasses.replace(OPTIONS, steps=25, smoothness=smoothness, smooth_share=0.5)
    rows = []
    train(student, teacher, tokens, options, on_event=rows.append)
    assert [row["step"] for row in rows] == list(range(1, 26))
    first, last = (
        {key: np.mean([row[key] for row in part]) for key in ("kl", "hidden", "smooth")}
        for part in (rows[:4], rows[-4:])
    )
    assert last["kl"] < 0.7 * first["kl"]
    assert last["hidden"] < 0.8 * first["hidden"]
    assert (last["smooth"] < 0.9 * first["smooth"]) == (smoothness != "none")


def test_the_layer_loss_falls_where_errors_can_cancel(student, teacher, tokens, outputs):
    options = dataclasses.replace(OPTIONS, steps=25, smoothness="layer", smooth_share=2.0)
    losses = []
    for smoothness in ("none", "layer"):
        result = train(
            student, teacher, tokens, dataclasses.replace(options, smoothness=smoothness), outputs=outputs
        )
        losses.append(float(layer_loss((result, CONFIG), teacher, outputs)))
    assert losses[1] < 0.8 * float(layer_loss(student, teacher, outputs))
    assert losses[1] < 0.8 * losses[0]


def test_the_smoothness_term_rises_over_the_first_steps(student, teacher, tokens):
    options = dataclasses.replace(OPTIONS, smoothness="gradient", smooth_warmup=0.5, smooth_share=1.0)
    rows = []
    train(student, teacher, tokens, options, on_event=rows.append)
    shares = [(row["loss"] - row["kl"] - row["hidden"]) / row["kl"] for row in rows]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1], rtol=1e-3)


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


def test_a_killed_run_goes_on_to_the_same_bits(student, teacher, tokens, tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["step"] == 5:
            raise KilledError

    options = dataclasses.replace(OPTIONS, smoothness="neighborhood")
    whole = train(student, teacher, tokens, options, folder=tmp_path / "whole")
    with pytest.raises(KilledError):
        train(student, teacher, tokens, options, folder=tmp_path / "parts", on_event=kill)
    with (tmp_path / "parts" / METRICS).open("a") as lines:
        lines.write('{"step": 6, "lo')  # what a kill may leave
    (tmp_path / "parts" / "state-00000006.orbax-checkpoint-tmp").mkdir()
    events = []
    parts = train(student, teacher, tokens, options, folder=tmp_path / "parts", on_event=events.append)
    assert events[0] == {"event": "resume", "step": 3, "steps": 8}
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [
        [json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    kept = [[{k: v for k, v in row.items() if k != "seconds"} for row in lines] for lines in rows]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 8
    assert [path.name for path in (tmp_path / "parts").glob("state-*")] == ["state-00000008"]


def test_what_is_not_trained_stays(student, teacher, tokens):
    result = train(student, teacher, tokens, OPTIONS)
    (moved, rest), (before, kept) = split(result), split(student[0])
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
        ({"smooth_share": float("nan")}, "smooth_share=nan: must not be negative"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(OPTIONS, **change)
    with pytest.raises(UsageError, match="2 windows for batch=4"):
        train(student, teacher, tokens[:2], OPTIONS)
    with pytest.raises(UsageError, match="the layer loss needs moments"):
        train(student, teacher, tokens, dataclasses.replace(OPTIONS, smoothness="layer"))


def test_merge_undoes_split(student):
    trained, rest = split(student[0])
    for one, other in zip(jax.tree.leaves(merge(trained, rest)), jax.tree.leaves(student[0]), strict=True):
        assert one is other
