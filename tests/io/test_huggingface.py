"""Hugging Face directories: what is loaded equals what was written, and damage is named."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from model_files import assert_params_equal, write_huggingface
from safetensors.numpy import load_file, save_file
from tiny_families import RAW, tiny_config, tiny_params, tiny_tokens
from tokenizers import Tokenizer, models, processors

from jaxquant.errors import InputError
from jaxquant.io import load_params, open_model
from jaxquant.models import decoder


def write(folder, name="llama2", **options):
    return write_huggingface(folder, RAW[name], tiny_params(tiny_config(name)), **options)


def write_tokenizer(folder, *, bos_first=False):
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", RAW)
def test_every_family(tmp_path, name):
    state = write(tmp_path, name)
    source = open_model(str(tmp_path))
    assert source.config == tiny_config(name)
    assert_params_equal(source.config, load_params(source), state)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_dtypes_and_shards(tmp_path, dtype, shards):
    state = write(tmp_path, dtype=dtype, shards=shards)
    source = open_model(str(tmp_path))
    params = load_params(source)
    assert_params_equal(source.config, params, state)
    assert source.config.dtype == dtype
    wide = load_params(source, dtype="float32")
    assert wide["head"].dtype == jnp.float32
    np.testing.assert_array_equal(wide["head"], params["head"].astype(jnp.float32))


def test_block_equals_slice_of_stack(tmp_path):
    write(tmp_path, "qwen2", shards=2)
    source = open_model(str(tmp_path))
    params = load_params(source)
    block = source.block(1)
    np.testing.assert_array_equal(block["attn"]["q"]["bias"], params["blocks"]["attn"]["q"]["bias"][1])
    np.testing.assert_array_equal(
        block["mlp"]["down"]["kernel"], params["blocks"]["mlp"]["down"]["kernel"][1]
    )
    assert set(source.outer()) == {"embed", "norm"}


def test_tied_although_the_head_is_stored(tmp_path):
    state = write(tmp_path, "qwen2")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    source = open_model(str(tmp_path))
    assert source.config.tie_embeddings
    assert "head" not in load_params(source)


def test_tied_by_absence(tmp_path):
    state = write(tmp_path)
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, tmp_path / "model.safetensors")
    source = open_model(str(tmp_path))
    assert source.config.tie_embeddings
    assert set(source.outer()) == {"embed", "norm"}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_prefixes(tmp_path, prefix):
    state = write(tmp_path, "gemma3")
    raw = {"model_type": "gemma3", "text_config": RAW["gemma3"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(
        {prefix + k.removeprefix("model."): v for k, v in state.items()}, tmp_path / "model.safetensors"
    )
    source = open_model(str(tmp_path))
    assert_params_equal(source.config, load_params(source), state)


def test_fingerprint_follows_the_content(tmp_path):
    for folder in ("one", "two", "other"):
        write(tmp_path / folder)
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["model.norm.weight"][3] += 1
    save_file(state, tmp_path / "other" / "model.safetensors")
    one, two, other = (open_model(str(tmp_path / folder)).fingerprint() for folder in ("one", "two", "other"))
    assert one == two != other


def test_tokenizer_is_bare(tmp_path):
    write(tmp_path)
    write_tokenizer(tmp_path, bos_first=True)
    raw = {**RAW["llama2"], "bos_token_id": 0, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    source = open_model(str(tmp_path))
    assert source.config.add_bos
    assert source.config.eos_ids == (2, 7)
    assert source.tokenizer().encode("ababab").ids == [3, 3, 3]


@pytest.mark.parametrize("declared", [True, False])
def test_declared_bos_wins(tmp_path, declared):
    write(tmp_path)
    write_tokenizer(tmp_path, bos_first=not declared)
    (tmp_path / "config.json").write_text(json.dumps({**RAW["llama2"], "bos_token_id": 0}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": declared}))
    assert open_model(str(tmp_path)).config.add_bos is declared


def test_chat_template(tmp_path):
    write(tmp_path)
    assert open_model(str(tmp_path)).chat_template is None
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_model(str(tmp_path)).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert open_model(str(tmp_path)).chat_template == "J"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_directory_saved_by_transformers(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = dict(RAW[name])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = tiny_tokens(name)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    source = open_model(str(tmp_path))
    ours = decoder.forward(load_params(source), source.config, jnp.asarray(tokens)).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def fails(folder, *patterns):
    """Opening and loading the model in `folder` raises one message that holds every pattern."""
    with pytest.raises(InputError) as caught:
        load_params(open_model(str(folder)))
    for pattern in patterns:
        assert pattern in str(caught.value)


def test_header_cut(tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    fails(tmp_path, "model.safetensors", "not a complete safetensors file", "fetch it again")


def test_data_cut(tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    fails(tmp_path, "model.safetensors", "not a complete safetensors file", "fetch it again")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs", b"\xff" * 64, b"PK\x03\x04" + bytes(100)]
)
def test_not_safetensors(tmp_path, content):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    fails(tmp_path, "model.safetensors", "not a complete safetensors file")


def test_missing_tensor(tmp_path):
    state = write(tmp_path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    fails(tmp_path, "model.layers.1.mlp.up_proj.weight is missing", "config.json")


def test_wrong_shape(tmp_path):
    state = write(tmp_path)
    state["model.layers.2.self_attn.k_proj.weight"] = np.zeros((32, 16), np.float32)
    save_file(state, tmp_path / "model.safetensors")
    fails(tmp_path, "model.layers.2.self_attn.k_proj.weight", "(32, 16)", "(32, 32)", "config.json")


def test_integer_weights(tmp_path):
    state = write(tmp_path)
    state["model.norm.weight"] = np.zeros(32, np.int8)
    save_file(state, tmp_path / "model.safetensors")
    fails(tmp_path, "model.norm.weight is I8", "already quantized")


def test_missing_shard(tmp_path):
    write(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    fails(tmp_path, "model-00002-of-00003.safetensors: missing", "fetch the remaining shards")


def test_index_names_a_tensor_that_is_not_there(tmp_path):
    write(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    where["model.norm.weight"] = next(s for s in set(where.values()) if s != where["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": where}))
    fails(tmp_path, "model.norm.weight is missing", "points to it")


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"model_type": "mamba"}', "mamba"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
    ],
)
def test_broken_json(tmp_path, file, content, pattern):
    write(tmp_path, shards=2)
    (tmp_path / file).write_text(content)
    fails(tmp_path, pattern)


def test_missing_files(tmp_path):
    fails(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text(json.dumps(RAW["llama2"]))
    fails(tmp_path, "neither model.safetensors nor", "convert")
    write(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json: missing; write it with"):
        open_model(str(tmp_path)).tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        open_model(str(tmp_path)).tokenizer()
