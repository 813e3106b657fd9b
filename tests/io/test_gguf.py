"""GGUF files: every family and type loads to what was written, and damage is named."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import GGUF_ARCHITECTURES, assert_params_equal, write_gguf
from tiny_families import RAW, tiny_config, tiny_params

from jaxquant.errors import InputError
from jaxquant.io import load_params, open_model
from jaxquant.models.families import from_hf

Type = gguf.GGMLQuantizationType

# Rows of a multiple of 32, as the block types need them.
WIDE = {
    **RAW["llama2"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def llama3_divisors(config):
    """What a converter stores for Llama 3: the divisor of each frequency, by the published piecewise rule."""
    rope, half = config.rope, config.head_dim // 2
    divisors = []
    for i in range(half):
        wavelength = 2 * np.pi * rope.theta ** (i / half)
        turns = rope.original_max_position / wavelength
        if turns > rope.high_freq_factor:
            divisors.append(1.0)
        elif turns < rope.low_freq_factor:
            divisors.append(rope.factor)
        else:
            mix = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            divisors.append(1 / ((1 - mix) / rope.factor + mix))
    return np.array(divisors)


EXTRA = {
    "llama_linear_biases": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    "llama_yarn": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    },
    "gemma3": {
        "gemma3.attention.sliding_window": 6,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    },
}
# GGUF keeps neither Mistral's window nor, for Gemma, a query scale of its own.
FAMILIES = [name for name in RAW if name != "mistral_sliding"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path, name):
    config = tiny_config(name)
    path = tmp_path / "model.gguf"
    divisors = llama3_divisors(config) if config.rope.kind == "llama3" else None
    state = write_gguf(path, RAW[name], tiny_params(config), rope_divisors=divisors, extra=EXTRA.get(name))
    source = open_model(str(path))
    expected = dataclasses.replace(config, norm_plus_one=False, add_bos=False)
    if name == "gemma3":
        expected = dataclasses.replace(expected, query_scale=config.head_dim**-0.5, bos_id=None, eos_ids=())
    assert source.name == "model"
    assert source.config == expected
    assert_params_equal(source.config, load_params(source), state)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_types(tmp_path, kind):
    state = write_gguf(tmp_path / "model.gguf", WIDE, tiny_params(from_hf(WIDE)), kind=kind)
    source = open_model(str(tmp_path / "model.gguf"))
    params = load_params(source)
    assert params["embed"].dtype == np.float32
    assert_params_equal(source.config, params, state)


def test_de_quantized_in_pieces(tmp_path, monkeypatch):
    import jaxquant.io.gguf_file as gguf_file

    monkeypatch.setattr(gguf_file, "_PIECE", 256)
    state = write_gguf(tmp_path / "model.gguf", WIDE, tiny_params(from_hf(WIDE)), kind=Type.Q4_1)
    source = open_model(str(tmp_path / "model.gguf"))
    assert_params_equal(source.config, load_params(source), state)


def test_gemma_window_pattern_defaults_to_six(tmp_path):
    raw = {**RAW["gemma3"], "num_hidden_layers": 7}
    del raw["layer_types"]
    extra = {"gemma3.attention.sliding_window": 6}
    write_gguf(tmp_path / "model.gguf", raw, tiny_params(from_hf(raw)), extra=extra)
    config = open_model(str(tmp_path / "model.gguf")).config
    assert config.sliding_layers == (True, True, True, True, True, False, True)
    assert config.rope_local is not None
    assert config.rope_local.theta == 10_000.0


def test_special_tokens_and_template(tmp_path):
    extra = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    write_gguf(tmp_path / "model.gguf", WIDE, tiny_params(from_hf(WIDE)), extra=extra)
    source = open_model(str(tmp_path / "model.gguf"))
    assert (source.config.bos_id, source.config.eos_ids, source.config.add_bos) == (1, (2, 5), True)
    assert source.chat_template == "{{ messages }}"


def test_unscaled_rope_divisors(tmp_path):
    config = tiny_config("llama2")
    write_gguf(tmp_path / "m.gguf", RAW["llama2"], tiny_params(config), rope_divisors=np.ones(4))
    assert open_model(str(tmp_path / "m.gguf")).config.rope == config.rope


def test_every_supported_family_has_an_architecture():
    assert set(GGUF_ARCHITECTURES) == {tiny_config(name).family for name in FAMILIES}


@pytest.fixture
def good(tmp_path) -> Path:
    write_gguf(tmp_path / "model.gguf", WIDE, tiny_params(from_hf(WIDE)), kind=Type.Q8_0)
    return tmp_path / "model.gguf"


def fails(path, *patterns):
    """Opening and loading `path` raises one message that holds every pattern."""
    with pytest.raises(InputError) as caught:
        load_params(open_model(str(path)))
    for pattern in (path.name, *patterns):
        assert pattern in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGML" + bytes(100), b"PK\x03\x04" + bytes(100)])
def test_bad_magic(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    fails(tmp_path / "model.gguf", "not a GGUF file")


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_bad_version(good, version):
    data = bytearray(good.read_bytes())
    data[4:8] = struct.pack("<I", version)
    good.write_bytes(data)
    fails(good, "GGUF version")


def test_cut_anywhere_in_the_header(good):
    data = good.read_bytes()
    end = data.index(b"output_norm")
    for length in range(4, end, 37):
        good.write_bytes(data[:length])
        fails(good, "broken GGUF header at byte", "fetch or convert it again")


def test_cut_in_the_data(good):
    data = good.read_bytes()
    for missing in (1, 5000, len(data) // 2):
        good.write_bytes(data[:-missing])
        fails(good, "tensor", "should end at byte", "fetch or convert it again")


def test_data_cut_after_opening(good):
    source = open_model(str(good))
    good.write_bytes(good.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"tensor blk\.0.* cannot be read"):
        source.block(0)


def test_random_damage_in_the_header_is_never_a_crash(good):
    data = good.read_bytes()
    end = data.index(b"output_norm") + 60
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(4, end, 3):
            damaged[at] = rng.integers(0, 256)
        good.write_bytes(damaged)
        try:
            source = open_model(str(good))
            source.block(0)
            source.outer()
        except InputError:
            pass


def test_missing_tensor(tmp_path):
    write_gguf(tmp_path / "m.gguf", WIDE, tiny_params(from_hf(WIDE)), drop=("blk.1.ffn_up.weight",))
    fails(tmp_path / "m.gguf", "blk.1.ffn_up.weight is missing", "no complete model")
    write_gguf(tmp_path / "m.gguf", WIDE, tiny_params(from_hf(WIDE)), drop=("token_embd.weight",))
    fails(tmp_path / "m.gguf", "token_embd.weight is missing")


def test_wrong_shape(tmp_path):
    write_gguf(
        tmp_path / "m.gguf", WIDE, tiny_params(from_hf(WIDE)), extra={"llama.attention.value_length": 8}
    )
    data = (tmp_path / "m.gguf").read_bytes()
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)
    (tmp_path / "m.gguf").write_bytes(data.replace(key + struct.pack("<I", 96), key + struct.pack("<I", 64)))
    fails(tmp_path / "m.gguf", "blk.0.ffn_gate.weight has shape (96, 64)", "(64, 64)", "convert it again")


def test_unknown_architecture(good):
    data = good.read_bytes()
    good.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    fails(good, "architecture 'mamba' is not supported", "llama, qwen2, qwen3, gemma3")


def test_missing_metadata(good):
    good.write_bytes(good.read_bytes().replace(b"llama.block_count", b"llama.block_cOunt"))
    fails(good, "llama.block_count is None")


def test_unknown_tensor_type(good):
    data = bytearray(good.read_bytes())
    at = data.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight")
    data[at + 4 + 8 : at + 4 + 8 + 4] = struct.pack("<I", 250)
    good.write_bytes(data)
    fails(good, "blk.0.attn_norm.weight has type 250", "update gguf")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling of type 'longrope'"),
        ({"llama.rope.dimension_count": 8}, "only part of each head is rotated"),
        ({"llama.expert_count": 8}, "num_experts"),
        ({"llama.attention.key_length": 0}, "llama.attention.key_length is 0"),
    ],
)
def test_unsupported_features(tmp_path, extra, pattern):
    write_gguf(tmp_path / "m.gguf", WIDE, tiny_params(from_hf(WIDE)), extra=extra)
    fails(tmp_path / "m.gguf", pattern)


def test_foreign_rope_divisors(tmp_path):
    write_gguf(tmp_path / "m.gguf", WIDE, tiny_params(from_hf(WIDE)), rope_divisors=np.linspace(1, 3, 8))
    fails(tmp_path / "m.gguf", "rope_freqs.weight is not the Llama 3 scaling")


def test_no_tokenizer(good):
    with pytest.raises(InputError, match="no tokenizer in the file"):
        open_model(str(good)).tokenizer()
