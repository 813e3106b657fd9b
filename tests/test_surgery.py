"""Rotated and quantized activations through the whole pipeline, on a small random model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, MemorySource, run
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.calibrate.fisher import fisher_weights
from jaxquant.calibrate.moments import observe
from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.evaluate import perplexity
from jaxquant.io import checkpoint, load_params
from jaxquant.kernels import use_backend
from jaxquant.methods import layer_error, quarot
from jaxquant.models import Precision
from jaxquant.models.config import LINEARS
from jaxquant.models.decoder import TAPS, forward
from jaxquant.models.init import init_params
from jaxquant.named import named
from jaxquant.pipeline import quantize_model
from jaxquant.plan import plan
from jaxquant.quant import ActivationGrid, Grid, QActivation, QArray
from jaxquant.recipe import Recipe, by_path, chain, read_toml, to_toml
from jaxquant.records import read_rows
from jaxquant.stages import AWQ, FINE, GPTQ, OSAQ, RTN
from jaxquant.surgery import OffQ, QuaRot, RotatedSource, SpinQuant, operate

GRID = Grid(bits=4, group_size=16, clip="mse")
NINE = dataclasses.replace(CONFIG, head_dim=9)


@pytest.fixture(scope="module")
def params():
    params = init_params(jax.random.key(0), CONFIG)
    gains = jax.random.uniform(jax.random.key(2), params["blocks"]["mlp_norm"].shape, minval=0.5, maxval=2)
    params["blocks"]["mlp_norm"] = gains
    # A direction that all tokens share, much stronger than the rest.
    return {**params, "embed": params["embed"].at[:, 3].add(3.0)}


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (4, 24), 0, 64), np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offq-w8a16kv16", "quarot-w8a16kv16"])
def test_8_bits_of_a_rotated_model_are_near_the_original(name, params, tokens, tmp_path):
    recipe = named(name, GRID)
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q")
    loaded, config = checkpoint.load_checkpoint(tmp_path / "q")
    assert config == recipe.runtime(CONFIG)
    assert config.precision.hidden_hadamard == (16 if "offq" in name else 48)
    assert isinstance(loaded["blocks"]["attn"]["q"]["kernel"], QArray)
    assert loaded["blocks"]["attn"]["key_rotation"].dtype == jnp.float32
    before = run(params, CONFIG, jnp.asarray(tokens)).logits
    after = run(loaded, config, jnp.asarray(tokens)).logits
    assert float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offq", "quarot"])
def test_16_bits_are_the_rotated_model(name, params, tokens, tmp_path):
    recipe = named(f"{name}-w16a16kv16", GRID)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    summary = quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q")
    assert summary["effective_bits"] == 16
    assert summary["mean_error"] == 0
    loaded, config = checkpoint.load_checkpoint(tmp_path / "q")
    assert loaded["blocks"]["mlp"]["down"]["kernel"].dtype == jnp.float16
    before = run(params, CONFIG, jnp.asarray(tokens)).logits
    after = run(loaded, config, jnp.asarray(tokens)).logits
    assert float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)) < 2e-3
    quantized = named(f"{name}-w16a4kv4", GRID)
    quantize_model(MemorySource(params), quantized, tokens, tmp_path / "a4")
    loaded, config = checkpoint.load_checkpoint(tmp_path / "a4")
    assert config.precision.keys.bits == 4
    after = run(loaded, config, jnp.asarray(tokens)).logits
    assert float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)) > 1e-2


@pytest.mark.slow
def test_activations_are_pictured_before_and_after(params, tokens, tmp_path):
    quantize_model(MemorySource(params), named("offq-w4a4kv4", GRID), tokens, tmp_path / "offq")
    sites = read_rows(tmp_path / "offq")[1]["sites"]
    names = ("attn_in", "attn_out", "mlp_in", "mlp_hidden", "keys", "values")
    assert [site["module"] for site in sites] == [f"blocks.{i}.{name}" for i in range(3) for name in names]
    first = sites[0]
    # One direction that all tokens share: large before, an offset after, nothing without it.
    assert first["before"][0] > 2 * first["after"][0] > 2 * first["rest"][0]
    assert first["error"] < 0.5 * first["error_before"]
    assert all(site["before"] == sorted(site["before"], reverse=True) for site in sites)
    # Nothing is rotated: the same before and after.
    quantize_model(MemorySource(params), named("rtn-w4a4kv16", GRID), tokens, tmp_path / "rtn")
    sites = read_rows(tmp_path / "rtn")[1]["sites"]
    assert len(sites) == 3 * 4
    assert all(site["before"] == site["after"] and site["error"] == site["error_before"] for site in sites)


@pytest.mark.slow
def test_gradients_are_those_of_the_rotated_float_model(params, tokens, tmp_path):
    recipe = named("offq-w4a4kv4", GRID)
    recipe = dataclasses.replace(recipe, hessian="fisher", stages=(*recipe.stages, FINE()))
    summary = quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q")
    assert 0 < summary["mean_error"] < summary["mean_error_rtn"]
    assert (tmp_path / "q" / "token_weights.npz").is_file()
    with np.load(tmp_path / "q" / "output_moments.npz") as stored:
        assert stored["mlp.down"].shape == (3, 32, 32)


@pytest.mark.slow
def test_every_linear_multiplies_integers_like_values(params, tokens, tmp_path):
    """On the same inputs: behind one another, a code that rounds the other way moves all that follows."""
    quantize_model(MemorySource(params), named("offq-w4a4kv4", GRID), tokens, tmp_path / "q")
    packed, config = checkpoint.load_checkpoint(tmp_path / "q")
    taps = run(packed, config, jnp.asarray(tokens), taps=TAPS).taps
    for tap, paths in LINEARS:
        for part, name in (path.split(".") for path in paths):
            for layer in range(config.num_layers):
                kernel = jax.tree.map(lambda a, i=layer: a[i], packed["blocks"][part][name]["kernel"])
                x = QActivation.of(taps[tap][layer], getattr(config.precision, tap))
                ours = np.asarray(x @ kernel)
                theirs = np.asarray(jnp.matmul(x.values, kernel.dequantize(), precision="highest"))
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    def count(jaxpr) -> int:
        """Calls, where the text has one function for all linears of a shape."""
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                total += all(operand.aval.dtype == jnp.int8 for operand in eqn.invars)
            # A jaxpr, closed or not.
            inner = (getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(eqn.params.values())))
            total += sum(count(value) for value in inner if hasattr(value, "eqns"))
        return total

    def integer_products(params) -> int:
        with use_backend("portable"):  # products of the kernel are not in the program
            return count(jax.make_jaxpr(lambda p: run(p, config, jnp.asarray(tokens)))(params).jaxpr)

    values = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QArray) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, QArray),
    )
    # Blocks are scanned, so each of a block's seven linears is traced once.
    assert integer_products(packed) == 7
    assert integer_products(values) == 0


@pytest.mark.slow
def test_offq_beats_quarot_and_no_rotation_at_4_bits(params, tokens, tmp_path):
    before = run(params, CONFIG, jnp.asarray(tokens)).logits
    errors = {}
    for name in ("rtn", "quarot", "offq"):
        quantize_model(MemorySource(params), named(f"{name}-w8a4kv4", GRID), tokens, tmp_path / name)
        after = run(*checkpoint.load_checkpoint(tmp_path / name), jnp.asarray(tokens)).logits
        errors[name] = float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))
    assert errors["offq"] < 0.9 * errors["quarot"]
    assert errors["offq"] < 0.9 * errors["rtn"]


@pytest.mark.slow
def test_errors_are_those_on_quantized_activations(params, tokens, tmp_path):
    """The Hessian of a linear is that of inputs on a grid, coming from blocks that are quantized too."""
    grids = Precision(attn_in=ActivationGrid(bits=2, group_size=16))
    recipe = chain(RTN(), grid=GRID, precision=grids)
    events: list[dict] = []
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "q", on_event=events.append)
    rows = {event["module"]: event["error"] for event in events if event["event"] == "row"}
    loaded, config = checkpoint.load_checkpoint(tmp_path / "q")
    assert config.precision == grids
    taps = run(loaded, config, jnp.asarray(tokens), taps=("attn_in",)).taps["attn_in"]
    for layer in range(CONFIG.num_layers):
        kernel = loaded["blocks"]["attn"]["q"]["kernel"]
        values = jax.tree.map(lambda leaf, i=layer: leaf[i], kernel).dequantize()
        second = observe(taps[layer]).second
        expected = layer_error(values, params["blocks"]["attn"]["q"]["kernel"][layer], second)
        assert rows[f"blocks.{layer}.attn.q"] == pytest.approx(float(expected), rel=1e-4)
        assert len(np.unique(np.asarray(taps[layer, 0, 0, :16]))) <= 4


def nll(source: RotatedSource, tokens) -> float:
    return perplexity(load_params(source), source.config, tokens).nll


@pytest.mark.slow
def test_learned_rotations_lower_the_loss_they_are_learned_on(params):
    """On text that the model itself has written, so that there is something to lose."""
    text = np.array(jax.random.randint(jax.random.key(5), (16, 48), 0, 64), np.int32)
    write = jax.jit(
        lambda t: jax.random.categorical(jax.random.key(3), 3 * forward(params, CONFIG, t).logits)
    )
    for at in range(47):
        text[:, at + 1] = np.asarray(write(text))[:, at]
    config = named("spinquant-w8a2kv16", GRID).runtime(CONFIG)
    surgery = SpinQuant(steps=48, learning_rate=0.2)
    first, again = (operate(MemorySource(params), surgery, config, text) for _ in range(2))
    start = operate(MemorySource(params), QuaRot(), config, text)
    assert nll(first, text) < nll(start, text)
    assert first.rotations is not None
    assert again.rotations is not None
    assert start.rotations is not None
    for name in ("residual", "values"):
        learned = getattr(first.rotations, name)
        np.testing.assert_array_equal(learned, getattr(again.rotations, name))
        assert np.abs(learned.mT @ learned - np.eye(learned.shape[-1])).max() <= 1e-12
        assert np.abs(learned - getattr(start.rotations, name)).max() > 1e-3
    np.testing.assert_array_equal(first.rotations.keys, start.rotations.keys)


@pytest.mark.slow
def test_learned_rotations_preserve_the_function():
    """With biases, and query heads that share a value head."""
    name = "llama_linear_biases"
    original, tokens = MemorySource(tiny_params(tiny_config(name)), tiny_config(name)), tiny_tokens(name)
    config = named("spinquant-w8a3kv3", GRID).runtime(original.config)
    rotated = operate(original, SpinQuant(steps=2), config, tokens)
    exact = dataclasses.replace(config, precision=Precision(hidden_hadamard=48))
    before = run(original.params, original.config, jnp.asarray(tokens)).logits
    after = run(load_params(rotated), exact, jnp.asarray(tokens)).logits
    assert float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before))) <= 1e-4


def test_nothing_is_learned_where_nothing_is_quantized(params, tokens):
    config = named("spinquant-w4a16kv16", GRID).runtime(CONFIG)
    rotations = operate(MemorySource(params), SpinQuant(seed=3), config, tokens).rotations
    assert rotations is not None
    np.testing.assert_array_equal(rotations.residual, quarot(CONFIG, 3).residual)


@pytest.mark.slow
def test_learned_rotations_are_learned_once(params, tokens, tmp_path, monkeypatch):
    config, surgery = named("spinquant-w8a4kv4", GRID).runtime(CONFIG), SpinQuant(steps=1)
    first = operate(MemorySource(params), surgery, config, tokens, keep=tmp_path / "r.npz")
    monkeypatch.delattr(SpinQuant, "rotations")
    again = operate(MemorySource(params), surgery, config, tokens, keep=tmp_path / "r.npz")
    for a, b in zip(jax.tree.leaves(first.block(1)), jax.tree.leaves(again.block(1)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_resumed_run_finds_the_same_bases(params, tokens, tmp_path, monkeypatch):
    precision = named("offq-w4a4kv4", GRID).precision
    recipe = chain(OffQ(group_size=16), OSAQ(eta=3e3), GPTQ(), grid=GRID, precision=precision)
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(MemorySource(params), recipe, tokens, tmp_path / "part", on_event=_stop_at_1)

    def not_again(*_):
        raise AssertionError("the bases of the interrupted run must be used")

    monkeypatch.setattr(OffQ, "rotations", not_again)
    quantize_model(MemorySource(params), recipe, tokens, tmp_path / "part", resume=True)
    whole, part = (jax.tree.leaves(checkpoint.load_checkpoint(tmp_path / n)[0]) for n in ("whole", "part"))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a, b)


def _stop_at_1(event):
    if event["event"] == "row" and event["block"] == 1:
        raise KeyboardInterrupt


def test_nan_is_named_before_bases_are_stored(params, tokens, tmp_path):
    broken = {**params, "blocks": {**params["blocks"], "mlp": dict(params["blocks"]["mlp"])}}
    kernel = params["blocks"]["mlp"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan)
    broken["blocks"]["mlp"]["up"] = {"kernel": kernel}
    with pytest.raises(NonFiniteError, match="NaN or infinity in its weights or activations"):
        quantize_model(MemorySource(broken), named("offq-w4a4kv4", GRID), tokens, tmp_path / "q")
    assert not (tmp_path / "q" / "rotations.npz").exists()


def test_half_precision_models_are_rotated_in_float32(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    config = named("quarot-w8a16kv16", GRID).runtime(CONFIG)
    sources = [RotatedSource(MemorySource(p), config, quarot(CONFIG, 0)) for p in (half, _wide(half))]
    blocks = [source.block(1) for source in sources]
    for block in blocks:
        assert block["mlp"].pop("hidden_hadamard").dtype == np.int8
    parts = ((block, source.outer()) for block, source in zip(blocks, sources, strict=True))
    for a, b in zip(*map(jax.tree.leaves, parts), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_rotations_change_no_gradient_norm(params, tokens):
    """The squared gradients at the outputs of linears, which weight the Fisher Hessian, are free of bases."""
    config = named("quarot-w8a16kv16", GRID).runtime(CONFIG)
    rotated = RotatedSource(MemorySource(params), config, quarot(CONFIG, 0))
    for before, after in zip(
        *(fisher_weights(s, tokens) for s in (MemorySource(params), rotated)), strict=True
    ):
        for tap, weights in before.items():
            np.testing.assert_allclose(after[tap], weights, rtol=1e-3)


def _wide(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def test_a_folded_source_is_the_same_model(params, tokens):
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    source = RotatedSource(MemorySource(params), config)
    blocks = [source.block(index) for index in range(CONFIG.num_layers)]
    assert all(np.all(block["mlp_norm"] == 1) for block in blocks)
    folded = {**source.outer(), "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}
    before, after = (run(p, c, jnp.asarray(tokens)).logits for p, c in ((params, CONFIG), (folded, config)))
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert source.fingerprint() == MemorySource(params).fingerprint()


@pytest.mark.parametrize("name", ["offq-w4a4kv4", "quarot-w8a8kv16", "spinquant-w4a4kv4", "rtn-w3a16kv4"])
def test_named_recipes_survive_toml(name, tmp_path):
    recipe = named(name, GRID)
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert read_toml(tmp_path / "r.toml") == recipe
    bits = [int(b) for b in name.split("-w")[1].replace("kv", " ").replace("a", " ").split()]
    assert recipe.grid.bits == bits[0]
    for grid, expected in ((recipe.precision.mlp_in, bits[1]), (recipe.precision.keys, bits[2])):
        assert (16 if grid is None else grid.bits) == expected
    assert str(recipe.precision) in str(recipe)


def test_the_plan_counts_the_untied_head_and_the_rotations_of_keys():
    tied, untied = (plan(CONFIG, named(n, GRID), samples=4, seqlen=24) for n in ("gptq", "quarot-w4a4kv4"))
    keys = 4 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * (CONFIG.head_dim + 1)
    assert untied.output_bytes - tied.output_bytes == 2 * CONFIG.vocab_size * CONFIG.hidden_size + keys


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chain(QuaRot(), OffQ(), RTN(), grid=GRID), "a model is rotated once; got QuaRot"),
        (lambda: chain(QuaRot(), AWQ(), RTN(), grid=GRID), "scales inputs that QuaRot .seed 0. has rotated"),
        (lambda: by_path({"mlp": named("quarot-w4a4kv4", GRID)}, named("rtn", GRID)), "concern whole blocks"),
        (
            lambda: chain(RTN(), grid=GRID, precision=Precision(hidden_hadamard=16)),
            "hidden_hadamard comes with a surgery",
        ),
        (lambda: OffQ(basis="pca"), "unknown basis 'pca'"),
        (lambda: OffQ(group_size=0), "group_size=0 must be positive"),
        (lambda: SpinQuant(steps=0), "steps=0 and learning_rate=.* must be positive"),
        (
            lambda: named("spinquant-w4a4kv4", GRID).runtime(tiny_config("gemma3")),
            "SpinQuant: gemma3_text has norms behind o and down, .* use quarot or offq",
        ),
        (
            lambda: chain(OffQ(group_size=12), RTN(), grid=GRID).runtime(CONFIG),
            "OffQ: 32 channels of the residual stream are not divisible by group_size=12",
        ),
        (lambda: chain(OffQ(group_size=1), RTN(), grid=GRID).runtime(NINE), "order head_dim=9 is known"),
        (
            lambda: chain(AWQ(), RTN(), grid=GRID, precision=named("rtn-w4a4kv4", GRID).precision),
            "AWQ scales inputs after they were collected",
        ),
        (lambda: named("offq-w4a4kv4", Grid(bits=4)), "offq-w4a4kv4 needs groups"),
        (lambda: named("quarot-w9a4kv4", GRID), "w9 is out of range; use w1 to w8, or w16 for none"),
        (lambda: named("offq-w4a1kv4", GRID), "offq-w4a1kv4: a1 is out of range; use a2 to a8, or a16"),
        (lambda: named("spin-w4a4kv4", GRID), "unknown recipe 'spin-w4a4kv4'"),
        (
            lambda: Recipe.from_dict({"stages": [{"stage": "rtn"}], "precision": {"k": {}}}),
            "precision: unknown options k",
        ),
        (
            lambda: Recipe.from_dict({"stages": [{"stage": "rtn"}], "precision": {"keys": {"bit": 4}}}),
            "precision.keys: unknown options bit",
        ),
        (
            lambda: Recipe.from_dict({"stages": [{"stage": "rtn"}], "precision": {"keys": 4}}),
            "precision.keys: 4 is no grid",
        ),
        (
            lambda: Recipe.from_dict({"stages": [{"stage": "rtn"}], "precision": {"keys": {"bits": 9}}}),
            "precision.keys: activation bits=9 is out of range",
        ),
        (
            lambda: plan(CONFIG, named("rtn-w4a4kv4", Grid(bits=4, group_size=32)), samples=1, seqlen=8),
            "mlp_hidden: 48 channels are not divisible by the activation group_size=32",
        ),
    ],
)
def test_bad_recipes_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offq", "quarot"])
def test_a_rotated_smollm2_computes_the_same(name, smollm2):
    tokens = np.asarray(smollm2.tokenizer().encode("The old lighthouse keeper climbed the stairs. " * 40).ids)
    tokens = tokens[:256].reshape(2, 128).astype(np.int32)
    recipe = named(f"{name}-w16a16kv16", Grid(bits=4, group_size=64))
    assert recipe.surgery is not None
    rotated = operate(smollm2, recipe.surgery, recipe.runtime(smollm2.config), tokens)
    before, after = (run(load_params(s), s.config, jnp.asarray(tokens)).logits for s in (smollm2, rotated))
    assert float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)) <= 1e-4
