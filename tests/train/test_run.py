"""Training into a folder: an ordinary quantized model, from a grid or from another run, resumable."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, MemorySource, run

from jaxquant.errors import InputError, UsageError
from jaxquant.io import checkpoint
from jaxquant.models.init import init_params
from jaxquant.named import named
from jaxquant.pipeline import quantize_model
from jaxquant.quant import Grid, QArray
from jaxquant.recipe import by_path, chain
from jaxquant.stages import RTN, Keep
from jaxquant.train import Training, train_model

GRID = Grid(bits=2, group_size=16, clip="mse")
# Every other set of options is compiled anew.
OPTIONS = Training(steps=20, batch=4, save_every=6, learning_rate=0.02)


@pytest.fixture(scope="module")
def source():
    return MemorySource(init_params(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (8, 16), 0, 64), np.int32)


@pytest.fixture(scope="module")
def quantized(source, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "q"
    quantize_model(source, named("gptq", dataclasses.replace(GRID, bits=3)), tokens, folder)
    return folder


def leaves(folder):
    return jax.tree.leaves(checkpoint.load_checkpoint(folder)[0])


def kl(source, folder, tokens):
    params, config = checkpoint.load_checkpoint(folder)
    p, q = (
        jax.nn.log_softmax(run(*model, jnp.asarray(tokens)).logits)
        for model in ((source.params, CONFIG), (params, config))
    )
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


@pytest.mark.slow
def test_the_result_is_a_quantized_model_that_is_nearer_to_the_original(source, tokens, tmp_path):
    plain = tmp_path / "rtn"
    quantize_model(source, named("rtn", GRID), tokens, plain)
    summary = train_model(source, GRID, tokens, OPTIONS, tmp_path / "t", describe={"seed": 0})
    params, config = checkpoint.load_checkpoint(tmp_path / "t")
    assert config == CONFIG
    kernel = params["blocks"]["mlp"]["down"]["kernel"]
    assert isinstance(kernel, QArray)
    assert kernel.grid == GRID
    assert params["blocks"]["attn_norm"].dtype == jnp.float32
    assert params["embed"].dtype == jnp.float16
    assert summary["effective_bits"] == pytest.approx(2 + 32 / 16)
    assert summary["disk_bytes"] == checkpoint.disk_bytes(tmp_path / "t")
    assert kl(source, tmp_path / "t", tokens) < 0.6 * kl(source, plain, tokens)
    assert [path.name for path in (tmp_path / "t" / "train").iterdir()] == ["metrics.jsonl"]
    manifest = checkpoint.read_manifest(tmp_path / "t")
    assert manifest["training"]["steps"] == 20
    assert manifest["calibration"]["seed"] == 0
    # What a kill behind the last manifest leaves is cleared away.
    (tmp_path / "t" / "train" / "state-00000020").mkdir()
    again = train_model(source, GRID, tokens, OPTIONS, tmp_path / "t", resume=True, describe={"seed": 0})
    assert again == summary
    assert [path.name for path in (tmp_path / "t" / "train").iterdir()] == ["metrics.jsonl"]


def test_room_for_the_states_is_asked_for(source, tokens, tmp_path, monkeypatch):
    trained = 4 * sum(leaf.size for leaf in jax.tree.leaves(source.params["blocks"]) if leaf.ndim == 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=6 * trained))
    with pytest.raises(InputError, match="free some space"):
        train_model(source, GRID, tokens, OPTIONS, tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
def test_training_starts_from_the_integers_of_a_folder(source, tokens, quantized, tmp_path):
    events = []
    train_model(source, quantized, tokens, OPTIONS, tmp_path / "t", on_event=events.append)
    # The first step's loss is that of the model as it was quantized.
    np.testing.assert_allclose(events[0]["kl"], kl(source, quantized, tokens[:4]), rtol=1e-2)
    assert kl(source, tmp_path / "t", tokens) < 0.9 * kl(source, quantized, tokens)


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_bits(source, tokens, tmp_path):
    options = dataclasses.replace(OPTIONS, smoothness="layer")

    def kill(event):
        if event["event"] == "step" and event["step"] == 15:
            raise KeyboardInterrupt

    train_model(source, GRID, tokens, options, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_model(source, GRID, tokens, options, tmp_path / "parts", on_event=kill)
    with pytest.raises(InputError, match="finish the run with --resume"):
        checkpoint.load_checkpoint(tmp_path / "parts")
    with pytest.raises(UsageError, match="started with another training: steps was 20, is 7"):
        train_model(
            source, GRID, tokens, dataclasses.replace(options, steps=7), tmp_path / "parts", resume=True
        )
    events = []
    train_model(source, GRID, tokens, options, tmp_path / "parts", resume=True, on_event=events.append)
    assert [e["step"] for e in events if e["event"] == "resume"] == [12]
    for one, other in zip(leaves(tmp_path / "whole"), leaves(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_starts_that_do_not_fit_are_refused(source, tokens, quantized, tmp_path):
    stranger = MemorySource(init_params(jax.random.key(9), CONFIG))
    with pytest.raises(UsageError, match="was made from memory, which is not memory; give the model"):
        train_model(stranger, quantized, tokens, OPTIONS, tmp_path / "a")
    kept = tmp_path / "kept"
    quantize_model(source, named("rtn-w16a8kv8", GRID), tokens, kept)
    with pytest.raises(UsageError, match="keeps its weights in floating point"):
        train_model(source, kept, tokens, OPTIONS, tmp_path / "b")


@pytest.mark.slow
def test_a_start_that_was_made_anew_is_another_start(source, tokens, quantized, tmp_path):
    def kill(event):
        if event["event"] == "step" and event["step"] == 7:
            raise KeyboardInterrupt

    start, out = tmp_path / "start", tmp_path / "t"
    shutil.copytree(quantized, start)
    with pytest.raises(KeyboardInterrupt):
        train_model(source, start, tokens, OPTIONS, out, on_event=kill)
    with pytest.raises(InputError, match="outside the vocabulary"):
        train_model(source, start, tokens + 64, OPTIONS, out, resume=True)
    moved = tmp_path / "moved"
    shutil.move(start, moved)
    manifest = checkpoint.read_manifest(moved)
    events = []
    train_model(source, moved, tokens, OPTIONS, out, resume=True, on_event=events.append)
    assert events[0]["step"] == 6
    checkpoint.write_manifest(moved, {**manifest, "training": {"steps": 3}})
    with pytest.raises(UsageError, match="started with another training"):
        train_model(source, moved, tokens, OPTIONS, out, resume=True)
    shutil.rmtree(out)
    checkpoint.write_manifest(moved, {**manifest, "state": "running"})
    with pytest.raises(InputError, match="only 3 of 3 blocks"):
        train_model(source, moved, tokens, OPTIONS, out)
    assert not out.exists()


@pytest.mark.slow
def test_damaged_states_are_named_and_missing_metrics_are_no_harm(source, tokens, tmp_path):
    def kill(event):
        if event["event"] == "step" and event["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(source, GRID, tokens, OPTIONS, tmp_path / "t", on_event=kill)
    (tmp_path / "t" / "train" / "metrics.jsonl").unlink()
    shutil.copytree(tmp_path / "t", tmp_path / "u")
    train_model(source, GRID, tokens, OPTIONS, tmp_path / "t", resume=True)
    shutil.rmtree(tmp_path / "u" / "train" / "state-00000006" / "params")
    with pytest.raises(InputError, match="state-00000006 cannot be read"):
        train_model(source, GRID, tokens, OPTIONS, tmp_path / "u", resume=True)


@pytest.mark.slow
def test_linears_that_are_kept_stay_as_they_are(source, tokens, tmp_path):
    recipe = by_path({r"mlp\.down": chain(Keep(), grid=GRID)}, chain(RTN(), grid=GRID))
    quantize_model(source, recipe, tokens, tmp_path / "q")
    options = dataclasses.replace(OPTIONS, smoothness="layer")
    train_model(source, tmp_path / "q", tokens, options, tmp_path / "t")
    before, after = (checkpoint.load_checkpoint(tmp_path / name)[0]["blocks"]["mlp"] for name in "qt")
    np.testing.assert_array_equal(before["down"]["kernel"], after["down"]["kernel"])
    assert isinstance(after["up"]["kernel"], QArray)


@pytest.mark.slow
def test_rotated_models_with_quantized_activations_are_trained_by_their_predictions(source, tokens, tmp_path):
    start = tmp_path / "q"
    quantize_model(source, named("quarot-w4a4kv4", dataclasses.replace(GRID, bits=4)), tokens, start)
    with pytest.raises(UsageError, match=r"is rotated .* use hidden_weight 0"):
        train_model(source, start, tokens, OPTIONS, tmp_path / "t")
    options = dataclasses.replace(OPTIONS, hidden_weight=0.0)
    train_model(source, start, tokens, options, tmp_path / "t")
    assert checkpoint.load_checkpoint(tmp_path / "t")[1].precision.attn_in is not None
    assert kl(source, tmp_path / "t", tokens) < 0.9 * kl(source, start, tokens)
