"""The pipeline on a small random model: results, resume, refusals."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, MemorySource, run

from jaxquant import jobs
from jaxquant.calibrate.fisher import fisher_weights, output_moments
from jaxquant.calibrate.moments import observe
from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.io import checkpoint, load_model
from jaxquant.methods import Problem, backward_error, layer_error
from jaxquant.models.decoder import TAPS, block, embed
from jaxquant.models.init import init_params
from jaxquant.named import named
from jaxquant.pipeline import quantize_model
from jaxquant.plan import plan
from jaxquant.quant import Grid, PairedArray, QArray, QStack, is_packed, paired
from jaxquant.recipe import by_path, chain
from jaxquant.records import read_rows
from jaxquant.stages import AWQ, FINE, GPTQ, QEP, RTN, Best, CoordinateDescent, GroupBits, Keep, MagR, Tune

GRID = Grid(bits=3, group_size=16, clip="mse")
RECIPE = named("gptq", GRID)

run_block = jax.jit(block, static_argnums=1, static_argnames=("sliding", "taps"))


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (4, 24), 0, 64), np.int32)


@pytest.fixture(scope="module")
def finished(params, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "q"
    events = []
    summary = quantize_model(
        MemorySource(params), RECIPE, tokens, folder, on_event=events.append, describe={"seed": 0}
    )
    return folder, summary, events


def leaves_of(folder: Path):
    params, _ = checkpoint.load_checkpoint(folder)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(params)}


def assert_same_model(a: Path, b: Path):
    first, second = leaves_of(a), leaves_of(b)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def test_rows_cover_every_linear_and_gptq_beats_rtn(finished):
    folder, summary, events = finished
    rows, pictures = read_rows(folder)
    histograms = pictures["histograms"]
    assert not pictures["sites"]
    assert [row["module"] for row in rows] == [
        f"blocks.{i}.{path}" for i in range(3) for path in checkpoint.PATHS
    ]
    assert [e for e in events if e["event"] == "row"] == [{"event": "row", **row} for row in rows]
    assert all(row["error"] <= row["error_rtn"] and not row["fallback"] for row in rows)
    assert summary["effective_bits"] == pytest.approx(3 + 32 / 16)
    assert {h["module"] for h in histograms} == {
        f"blocks.{i}.{p}" for i in range(3) for p in ("attn.q", "mlp.down")
    }
    weights = {row["module"]: row["shape"][0] * row["shape"][1] for row in rows}
    assert all(sum(h["counts"]) == weights[h["module"]] for h in histograms)


def test_errors_are_those_of_the_saved_weights_on_the_inputs_from_the_quantized_prefix(
    finished, params, tokens
):
    folder, _, _ = finished
    rows, _ = read_rows(folder)
    reported = {row["module"]: row["error"] for row in rows}
    quantized, config = checkpoint.load_checkpoint(folder)
    x = embed(quantized, config, jnp.asarray(tokens))
    for index in range(3):
        original = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
        packed = jax.tree.map(lambda leaf, i=index: leaf[i], quantized["blocks"])
        _, _, taps = run_block(original, config, x, sliding=False, taps=TAPS)
        for path, tap in (
            ("attn.k", "attn_in"),
            ("attn.o", "attn_out"),
            ("mlp.up", "mlp_in"),
            ("mlp.down", "mlp_hidden"),
        ):
            part, name = path.split(".")
            weight = original[part][name]["kernel"]
            error = layer_error(packed[part][name]["kernel"].dequantize(), weight, observe(taps[tap]).second)
            assert float(error) == pytest.approx(reported[f"blocks.{index}.{path}"], rel=1e-4)
        x, _, _ = run_block(packed, config, x, sliding=False)


def test_a_model_in_pairs_runs_and_is_saved_as_it_was(finished, tokens, tmp_path):
    folder, _, _ = finished
    model = load_model(str(folder)).to_run()
    assert isinstance(model.params["blocks"]["mlp"]["down"]["kernel"], QArray)  # this is no TPU
    pairs = paired(model.params)
    assert isinstance(pairs["blocks"]["mlp"]["down"]["kernel"], PairedArray)
    logits, expected = (run(p, model.config, jnp.asarray(tokens[:1])).logits for p in (pairs, model.params))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    checkpoint.save_block(tmp_path, 0, jax.tree.map(lambda leaf: leaf[0], pairs["blocks"]), {})
    saved, own = (checkpoint.load_block(place, 0)[0] for place in (tmp_path, folder))
    assert jax.tree.structure(saved) == jax.tree.structure(own)
    jax.tree.map(np.testing.assert_array_equal, saved, own)


def test_reload_is_bit_exact_and_runs(finished, tokens):
    folder, _, _ = finished
    model = load_model(str(folder))
    kernel = model.params["blocks"]["mlp"]["down"]["kernel"]
    assert isinstance(kernel, QArray)
    assert kernel.grid == GRID
    one, _ = checkpoint.load_block(folder, 1)
    np.testing.assert_array_equal(kernel.words[1], one["mlp"]["down"]["kernel"].words)
    logits = run(model.params, model.config, jnp.asarray(tokens[:1])).logits
    dense = jax.tree.map(
        lambda leaf: jax.vmap(lambda q: q.dequantize())(leaf) if isinstance(leaf, QArray) else leaf,
        model.params, is_leaf=lambda leaf: isinstance(leaf, QArray),
    )  # fmt: skip
    np.testing.assert_allclose(
        logits, run(dense, model.config, jnp.asarray(tokens[:1])).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("recipe", [
    named("rtn", GRID),
    named("gptq", GRID, true_sequential=True),
    named("gptq", Grid(bits=4, symmetric=True)),
    chain(GPTQ(), grid=GRID, hessian="fisher", mask="first"),
    *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in (
        named("gptq", GRID, gptq=GPTQ(groups="dynamic")),
        named("awq-gptq", GRID),
        chain(AWQ(objective="block", steps=4), RTN(), grid=GRID),
        named("osaq-dagger", GRID),
        named("osaq-gptq-fine", GRID),
        chain(AWQ(), GPTQ(), Tune(steps=4), grid=GRID),
        dataclasses.replace(
            named("offq-w4a4kv4", GRID), stages=(*named("offq-w4a4kv4", GRID).stages, Tune(steps=4))
        ),
    )),
], ids=str)  # fmt: skip
def test_every_option_gives_a_loadable_model(recipe, params, tokens, tmp_path):
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q")
    loaded, config = checkpoint.load_checkpoint(tmp_path / "q")
    assert bool(jnp.all(jnp.isfinite(run(loaded, config, jnp.asarray(tokens[:1])).logits)))
    rows, _ = read_rows(tmp_path / "q")
    assert all(row["error"] < 0.5 for row in rows)


def test_fisher_weights_enter_the_errors_and_are_kept_for_a_resumed_run(params, tokens, tmp_path):
    recipe = chain(GPTQ(), grid=GRID, hessian="fisher")
    events = []
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q", on_event=events.append)
    assert [e["done"] for e in events if e["event"] == "gradient"] == list(range(1, 7))
    weights = fisher_weights(MemorySource(params), tokens)
    x = embed({"embed": params["embed"].astype(jnp.float16)}, CONFIG, jnp.asarray(tokens))
    original = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    taps = run_block(original, CONFIG, x, sliding=False, taps=TAPS)[2]
    moments = observe(taps["attn_in"], weights=jnp.asarray(weights[0]["attn_in"]))
    saved, _ = checkpoint.load_block(tmp_path / "q", 0)
    error = layer_error(
        saved["attn"]["q"]["kernel"].dequantize(), original["attn"]["q"]["kernel"], moments.second
    )
    rows, _ = read_rows(tmp_path / "q")
    np.testing.assert_allclose(rows[0]["error"], error, rtol=1e-3)

    with pytest.raises(KeyboardInterrupt):
        quantize_model(MemorySource(params, fail_at=2), recipe, tokens, tmp_path / "r")
    # Interrupted in the gradients; now in the third block.
    shutil.copy(tmp_path / "q" / "token_weights.npz", tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(MemorySource(params, fail_at=2), recipe, tokens, tmp_path / "r", resume=True)
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "r", resume=True)
    assert_same_model(tmp_path / "q", tmp_path / "r")


@pytest.mark.parametrize("true_sequential", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_drift_is_between_the_quantized_prefix_and_the_original(true_sequential, params, tokens, tmp_path):
    recipe = chain(QEP(alpha=1.0), RTN(), grid=GRID, true_sequential=true_sequential)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(MemorySource(params, fail_at=2), recipe, tokens, tmp_path / "q")
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q", resume=True)
    quantized, config = checkpoint.load_checkpoint(tmp_path / "q")
    now = then = embed(quantized, config, jnp.asarray(tokens))
    for index in range(3):
        original = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
        packed = jax.tree.map(lambda leaf, i=index: leaf[i], quantized["blocks"])
        behind, _, known = run_block(original, config, then, sliding=False, taps=TAPS)
        _, _, taps = run_block(packed if true_sequential else original, config, now, sliding=False, taps=TAPS)
        for path, tap in (("attn.v", "attn_in"), ("attn.o", "attn_out"), ("mlp.down", "mlp_hidden")):
            part, name = path.split(".")
            moments = observe(taps[tap], original=known[tap])
            expected = recipe.at("")(Problem.of(original[part][name]["kernel"], moments, GRID)).pack()
            np.testing.assert_allclose(
                packed[part][name]["kernel"].dequantize(), expected.dequantize(), rtol=1e-3, atol=1e-5
            )
        then, now = behind, run_block(packed, config, now, sliding=False)[0]


@pytest.mark.slow
def test_choices_are_logged(params, tokens, tmp_path):
    best = Best((MagR(alpha=1e-2, iterations=20), MagR(alpha=1e-4, iterations=20)))
    quantize_model(MemorySource(params), chain(best, RTN(), grid=GRID), tokens, tmp_path / "q")
    rows, _ = read_rows(tmp_path / "q")
    options = ["off", "MagR (alpha 0.01, 20 iterations)", "MagR (alpha 0.0001, 20 iterations)"]
    for row in rows:
        assert list(row["choices"]) == options
        assert sum(row["choices"].values()) == row["shape"][1]
    assert all(sum(row["choices"][option] for row in rows) for option in rows[0]["choices"])


@pytest.mark.parametrize("stop", [0, 2])
def test_resume_after_an_interrupt_is_bit_identical(stop, finished, params, tokens, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            MemorySource(params, fail_at=stop),
            RECIPE,
            tokens,
            tmp_path / "q",
            describe={"seed": 0},
        )
    # What a kill in the middle of a save leaves behind.
    (tmp_path / "q" / "blocks" / f"{stop:03d}.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(
        InputError, match=f"only {stop} of 3 blocks are quantized; finish the run with --resume"
    ):
        load_model(str(tmp_path / "q"))
    events = []
    quantize_model(
        MemorySource(params), RECIPE, tokens, tmp_path / "q", resume=True, on_event=events.append,
        describe={"seed": 0},
    )  # fmt: skip
    assert sum(e["event"] == "row" for e in events) == 7 * (3 - stop)
    assert_same_model(finished[0], tmp_path / "q")


@pytest.mark.parametrize("stop", ["jaxquant.json", "recipe.toml", "tokenizer.json"])
def test_a_kill_while_the_folder_is_made_is_resumable(stop, finished, params, tokens, tmp_path, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if Path(target).name == stop:
            raise KeyboardInterrupt
        replace(source, target)

    arguments = (MemorySource(params), RECIPE, tokens, tmp_path / "q")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(*arguments, describe={"seed": 0})
    monkeypatch.setattr(os, "replace", replace)
    quantize_model(*arguments, resume=True, describe={"seed": 0})
    assert_same_model(finished[0], tmp_path / "q")
    for name in ("recipe.toml", "tokenizer.json"):
        assert (tmp_path / "q" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_resume_refuses_another_model_recipe_or_text(finished, params, tokens):
    folder, _, _ = finished
    other = init_params(jax.random.key(5), CONFIG)

    def resume(source, recipe, tokens):
        quantize_model(source, recipe, tokens, folder, resume=True, describe={"seed": 0})

    with pytest.raises(UsageError, match=r"started with another source: fingerprint was .* give the model"):
        resume(MemorySource(other), RECIPE, tokens)
    with pytest.raises(UsageError, match=r"another recipe: stages\.0\.act_order was True, is False; give"):
        resume(MemorySource(params), named("gptq", GRID, gptq=GPTQ(act_order=False)), tokens)
    with pytest.raises(UsageError, match="started with another calibration: tokens_sha256"):
        resume(MemorySource(params), RECIPE, tokens[::-1].copy())


def test_existing_folders_are_not_overwritten(finished, params, tokens, tmp_path):
    with pytest.raises(UsageError, match="holds a quantized model; give --resume"):
        quantize_model(MemorySource(params), RECIPE, tokens, finished[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty; give another --out"):
        quantize_model(MemorySource(params), RECIPE, tokens, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_group_size_that_does_not_divide_is_refused_before_anything_is_written(params, tokens, tmp_path):
    with pytest.raises(
        UsageError, match=r"blocks\.0\.mlp\.down: 48 inputs are not divisible by group_size=32"
    ):
        quantize_model(MemorySource(params), named("gptq", Grid(group_size=32)), tokens, tmp_path / "q")
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
def test_blocks_with_different_grids_run_and_reload(params, tokens, tmp_path):
    kept = chain(Keep(), grid=GRID)
    dynamic = chain(GPTQ(groups="dynamic"), grid=GRID)
    rules = {r"blocks\.0\.": named("rtn", Grid(bits=8)), r"\.1\.mlp\.up": kept, r"\.2\.attn\.q": dynamic}
    recipe, source = by_path(rules, RECIPE), MemorySource(params)
    summary = quantize_model(source, recipe, tokens, tmp_path / "q")
    loaded, config = checkpoint.load_checkpoint(tmp_path / "q")
    kernels = {
        path: loaded["blocks"][path.split(".")[0]][path.split(".")[1]]["kernel"] for path in checkpoint.PATHS
    }
    assert all(isinstance(kernel, QStack) for kernel in kernels.values())
    assert [len(kernels[path].parts) for path in ("attn.k", "attn.q", "mlp.up")] == [2, 3, 3]
    estimate = plan(source.config, recipe, samples=4, seqlen=24)
    assert summary["quantized_bytes"] == sum(r["bytes"] for r in read_rows(tmp_path / "q")[0])
    assert estimate.effective_bits == pytest.approx(summary["effective_bits"])

    def dense(leaf):
        return leaf.dequantize() if is_packed(leaf) else leaf

    plain = [
        jax.tree.map(dense, checkpoint.load_block(tmp_path / "q", i)[0], is_leaf=is_packed) for i in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(a, jnp.float32) for a in leaves]), *plain)
    ours = run(loaded, config, tokens).logits
    theirs = run({**loaded, "blocks": stacked}, config, tokens).logits
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bits_by_group_are_saved_reloaded_and_counted(params, tokens, tmp_path):
    grid = dataclasses.replace(GRID, group_size=8)
    recipe = chain(GroupBits(shares=(0.25,)), GPTQ(), CoordinateDescent(), grid=grid)
    # The first channels of the stream carry most of the energy, so groups are not alike.
    fading = jnp.exp(jnp.linspace(2, -4, CONFIG.hidden_size))
    norms = {name: params["blocks"][name] * fading[None] for name in ("attn_norm", "mlp_norm")}
    params = {**params, "blocks": {**params["blocks"], **norms}}
    source = MemorySource(params)
    summary = quantize_model(source, recipe, tokens, tmp_path / "q")
    rows, pictures = read_rows(tmp_path / "q")
    groups = {"mlp.down": 6}
    for row in rows:
        count = groups.get(row["linear"], 4)
        assert row["bits"] == 3
        mixed = "widths" in row  # else no swap paid
        assert row.get("widths", {}) == ({"2": 1, "3": count - 2, "4": 1} if mixed else {})
        assert row["bytes"] == np.prod(row["shape"]) * (3 + 32 / 8) / 8 + 4 * count * mixed
    assert sum("widths" in row for row in rows) > 3
    assert pictures["histograms"]
    # The plan cannot know where swaps will pay: it counts an order of groups everywhere.
    spared = sum(32 * groups.get(row["linear"], 4) for row in rows if "widths" not in row)
    planned = plan(CONFIG, recipe, samples=4, seqlen=24).effective_bits
    weights = sum(np.prod(row["shape"]) for row in rows)
    assert planned == pytest.approx(summary["effective_bits"] + spared / weights)
    loaded, config = checkpoint.load_checkpoint(tmp_path / "q")
    moments = observe(jax.random.normal(jax.random.key(3), (64, 48)))
    own = recipe.at("blocks.1.mlp.down")
    rounded = own(Problem.of(params["blocks"]["mlp"]["down"]["kernel"][1], moments, grid))
    np.testing.assert_array_equal(rounded.values(), rounded.pack().dequantize())
    assert float(jnp.mean(rounded.group_bits)) == 3
    plain = [
        jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf,
                     checkpoint.load_block(tmp_path / "q", i)[0], is_leaf=is_packed)
        for i in range(3)
    ]  # fmt: skip
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(a, jnp.float32) for a in leaves]), *plain)
    ours = run(loaded, config, tokens).logits
    theirs = run({**loaded, "blocks": stacked}, config, tokens).logits
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_grids_that_cannot_mix_are_refused():
    for grid in (Grid(bits=3), Grid(bits=3, group_size=8, symmetric=True), Grid(bits=8, group_size=8)):
        with pytest.raises(UsageError, match="bits by group need an asymmetric grid of 2 to 7 bits"):
            chain(GroupBits(), RTN(), grid=grid)
    with pytest.raises(UsageError, match="bits by group need"):
        chain(GroupBits(), GPTQ(groups="dynamic"), grid=GRID)


@pytest.mark.parametrize(("path", "place"), [
    (("mlp", "up"), r"blocks\.1\.mlp\.up: NaN or infinity in its weight"),
    (("mlp_norm",), r"blocks\.1\.mlp\.gate: NaN or infinity in the activations that enter it"),
])  # fmt: skip
def test_nan_is_an_error_that_names_the_module(path, place, params, tokens, tmp_path):
    blocks = jax.tree.map(lambda leaf: leaf, params["blocks"])
    if path == ("mlp_norm",):
        blocks["mlp_norm"] = blocks["mlp_norm"].at[1, 3].set(jnp.nan)
    else:
        blocks["mlp"]["up"] = {"kernel": blocks["mlp"]["up"]["kernel"].at[1, 3, 4].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match=place):
        quantize_model(MemorySource({**params, "blocks": blocks}), RECIPE, tokens, tmp_path / "q")


def test_dead_inputs_are_counted(params, tokens, tmp_path):
    blocks = {**params["blocks"], "mlp_norm": params["blocks"]["mlp_norm"].at[:, 5].set(0)}
    quantize_model(MemorySource({**params, "blocks": blocks}), RECIPE, tokens, tmp_path / "q")
    rows, _ = read_rows(tmp_path / "q")
    assert {row["linear"] for row in rows if row["dead"] == 1} == {"mlp.gate", "mlp.up"}


def test_a_full_disk_is_reported_and_the_run_resumes(finished, params, tokens, tmp_path, monkeypatch):
    folder, save = tmp_path / "q", checkpoint._checkpointer

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def save(self, path, **_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(
        checkpoint, "_checkpointer", lambda: Full() if (folder / "blocks" / "001").exists() else save()
    )
    arguments = (MemorySource(params), RECIPE, tokens, folder)
    with pytest.raises(InputError, match=r"blocks.002: the disk is full; free some space .* --resume"):
        quantize_model(*arguments, describe={"seed": 0})
    monkeypatch.setattr(checkpoint, "_checkpointer", save)
    quantize_model(*arguments, resume=True, describe={"seed": 0})
    assert_same_model(finished[0], folder)


def test_too_little_space_is_noticed_before_work_starts(params, tokens, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs .* MB, the disk has 0 MB free"):
        quantize_model(MemorySource(params), RECIPE, tokens, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_damaged_blocks_are_named(finished, tmp_path):
    folder = tmp_path / "q"
    shutil.copytree(finished[0], folder)
    for file in (folder / "blocks" / "001" / "params" / "d").iterdir():
        file.write_bytes(b"")
    # In a process of its own: orbax abandons its parallel reads when one fails, and their errors would
    # surface in whatever test runs when they are collected.
    command = [sys.executable, "-m", "jaxquant.cli", "generate", str(folder), "--prompt", "w1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert re.search(r"blocks.001 cannot be read .* --resume", result.stderr)


def test_damaged_manifests_are_named(finished, tmp_path):
    folder = tmp_path / "q"
    shutil.copytree(finished[0], folder)
    (folder / "jaxquant.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format 99, this version reads 1"):
        load_model(str(folder))
    (folder / "jaxquant.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_model(str(folder))
    for content, reason in (("[]", "not a JSON object"), ('{"format": 1}', "no source, recipe")):
        (folder / "jaxquant.json").write_text(content)
        with pytest.raises(InputError, match=f"is damaged .{reason}"):
            load_model(str(folder))


def test_the_plan_scales_with_the_work():
    small = plan(CONFIG, RECIPE, samples=4, seqlen=16)
    assert small.linears == 21
    assert small.effective_bits == pytest.approx(5)
    large = plan(CONFIG, named("gptq", Grid(bits=8, group_size=16)), samples=4000, seqlen=64)
    assert large.peak_bytes > small.peak_bytes
    assert large.output_bytes > small.output_bytes
    fisher = plan(CONFIG, dataclasses.replace(RECIPE, hessian="fisher"), samples=4, seqlen=16)
    assert fisher.peak_bytes == small.peak_bytes + 4 * 3 * 64 * 32  # the inputs of three blocks
    fine = plan(CONFIG, named("gptq-fine", GRID), samples=4, seqlen=16)
    outputs = sum(CONFIG.linear_shape(path)[1] ** 2 for path in checkpoint.PATHS)
    assert fine.peak_bytes == fisher.peak_bytes + 2 * 4 * 3 * outputs


def test_packed_bytes_are_those_that_the_grids_promise(finished):
    _, summary, _ = finished
    config = CONFIG
    promised = (
        sum(GRID.effective_bits(n) / 8 * n * m for n, m in map(config.linear_shape, checkpoint.PATHS))
        * config.num_layers
    )
    assert summary["quantized_bytes"] == promised


def test_kept_linears_stay_as_they_are(params, tokens, tmp_path):
    recipe = by_path({r"mlp\.down": chain(Keep(), grid=GRID)}, RECIPE)
    summary = quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q")
    loaded, _ = checkpoint.load_checkpoint(tmp_path / "q")
    kernel = loaded["blocks"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(kernel, params["blocks"]["mlp"]["down"]["kernel"].astype(jnp.float16))
    assert isinstance(loaded["blocks"]["mlp"]["up"]["kernel"], QArray)
    rows, _ = read_rows(tmp_path / "q")
    assert {row["bits"] for row in rows if row["linear"] == "mlp.down"} == {16}
    assert summary["effective_bits"] == pytest.approx(
        plan(CONFIG, recipe, samples=4, seqlen=24).effective_bits
    )
    assert summary["effective_bits"] > 5


def test_kept_weights_are_checked(params, tokens, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["blocks"]["mlp"]["down"]["kernel"] = (
        params["blocks"]["mlp"]["down"]["kernel"].at[1, 0, 0].set(jnp.nan)
    )
    recipe = chain(Keep(), grid=GRID)
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.mlp\.down: NaN or infinity in its weight"):
        quantize_model(MemorySource(broken), recipe, tokens, tmp_path / "q")
    with pytest.raises(UsageError, match="weights that are kept are not transformed"):
        chain(MagR(), Keep(), grid=GRID)
    with pytest.raises(UsageError, match="scales whole blocks, kept linears too"):
        by_path({"down": chain(Keep(), grid=GRID)}, chain(AWQ(), RTN(), grid=GRID))
    with pytest.raises(UsageError, match="only has a meaning in the recipe of a model"):
        recipe(Problem.of(jnp.ones((16, 4)), observe(jnp.ones((2, 16))), GRID))


@pytest.mark.slow
def test_fine_gives_forward_error_for_backward_error(params, tokens, tmp_path):
    gradients = output_moments(MemorySource(params), tokens)
    errors = {}
    recipes = {"gptq": named("gptq", GRID), "fine": chain(GPTQ(), FINE(objective="backward"), grid=GRID)}
    for name, recipe in recipes.items():
        summary = quantize_model(MemorySource(params), recipe, tokens, tmp_path / name)
        kernel = checkpoint.load_checkpoint(tmp_path / name)[0]["blocks"]["mlp"]["up"]["kernel"]
        backward = [
            float(backward_error(values, weight, jnp.asarray(own["mlp.up"])))
            for values, weight, own in zip(
                kernel.dequantize(), params["blocks"]["mlp"]["up"]["kernel"], gradients, strict=True
            )
        ]
        errors[name] = summary["mean_error"], np.mean(backward)
    assert errors["fine"][1] < 0.9 * errors["gptq"][1]
    assert errors["fine"][0] < 1.2 * errors["gptq"][0]
    with np.load(tmp_path / "fine" / "output_moments.npz") as stored:
        np.testing.assert_allclose(stored["mlp.up"][1], gradients[1]["mlp.up"], rtol=1e-5)


@pytest.mark.slow
def test_tuned_scales_enter_the_rows_and_survive_an_interrupt(params, tokens, tmp_path):
    recipe = chain(GPTQ(), Tune(steps=8), grid=GRID)
    summary = quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q")
    plain = quantize_model(MemorySource(params), RECIPE, tokens, tmp_path / "plain")
    tuned, untuned = leaves_of(tmp_path / "q"), leaves_of(tmp_path / "plain")
    down = next(key for key in tuned if "down" in key and "words" in key)
    np.testing.assert_array_equal(tuned[down][0], untuned[down][0])
    scales = down.replace("words", "scale")
    assert not np.array_equal(tuned[scales][0], untuned[scales][0])
    # GPTQ's scales were chosen for the weights; outputs of the block are worth other errors of its linears.
    assert 0 < summary["mean_error"] != plain["mean_error"]
    original = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = embed({"embed": params["embed"].astype(jnp.float16)}, CONFIG, jnp.asarray(tokens))
    taps = run_block(original, CONFIG, x, sliding=False, taps=TAPS)[2]
    saved, record = checkpoint.load_block(tmp_path / "q", 0)
    row = next(row for row in record["rows"] if row["linear"] == "attn.q")
    values = saved["attn"]["q"]["kernel"].dequantize()
    second = observe(taps["attn_in"]).second
    assert row["error"] == pytest.approx(
        float(layer_error(values, original["attn"]["q"]["kernel"], second)), rel=1e-3
    )
    with pytest.raises(KeyboardInterrupt):
        quantize_model(MemorySource(params, fail_at=2), recipe, tokens, tmp_path / "r")
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "r", resume=True)
    for key, leaf in leaves_of(tmp_path / "r").items():
        np.testing.assert_array_equal(leaf, tuned[key])


@pytest.mark.slow
def test_a_finish_that_changes_nothing_reports_the_same_errors(params, tokens, tmp_path):
    """Recipes with a choice hold samples out; errors are those on all of them, with a finish or without."""
    recipe = named("osaq-gptq", GRID)
    finished = dataclasses.replace(recipe, stages=(*recipe.stages, Tune(steps=0)))
    errors = []
    for name, own in (("plain", recipe), ("finished", finished)):
        quantize_model(MemorySource(params), own, tokens, tmp_path / name)
        errors.append([row["error"] for row in read_rows(tmp_path / name)[0]])
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4)


def test_fine_needs_gradients():
    problem = Problem.of(jnp.ones((16, 4)), observe(jnp.ones((2, 16))), GRID)
    with pytest.raises(UsageError, match="fine needs gradients: give Problem outputs"):
        named("gptq-fine", GRID).at("blocks.0.attn.q")(problem)
    with pytest.raises(UsageError, match="scales outputs after their gradients were collected"):
        chain(AWQ(), GPTQ(), FINE(), grid=GRID)
    with pytest.raises(UsageError, match="strength and sweeps must not be negative"):
        FINE(strength=-1)
    with pytest.raises(UsageError, match="unknown objective 'forward'; use loss or backward"):
        FINE(objective="forward")  # pyright: ignore[reportArgumentType]


def test_a_run_from_python_is_reported(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "q")
    assert "unnamed text" in jobs.report(folder).read_text()
