from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantized_folder import GRID, RNG, folder_of, mixed_kernel, packed
from safetensors.numpy import load_file
from small_model import CONFIG
from tokenizers import Tokenizer

from jaxquant.errors import InputError, UsageError
from jaxquant.io import checkpoint, open_model
from jaxquant.io.export import compressed_tensors, export_compressed_tensors
from jaxquant.io.export.compressed_tensors import pack_dense
from jaxquant.models.config import EXACT, Precision
from jaxquant.models.families import block_names, from_hf
from jaxquant.quant import ActivationGrid, Grid, MixedQArray


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.randoms(use_true_random=False))
def test_codes_are_one_stream_of_bits(bits, rows, n, random):
    codes = np.array([[random.randrange(2**bits) for _ in range(n)] for _ in range(rows)], np.uint8)
    words = pack_dense(codes, bits)
    assert (words.shape, words.dtype) == ((rows, -(-n * bits // 32)), np.int32)
    for row, own in zip(codes, words, strict=True):
        stream = sum(int(code) << (k * bits) for k, code in enumerate(row))
        assert int.from_bytes(own.tobytes(), "little") == stream


def dense(tensors, linear, weights):
    """`[out, in]` from the tensors of a linear, by Python's own integers."""
    out, inputs = tensors[f"{linear}.weight_shape"]
    bits = weights["num_bits"]

    def codes(words, n):
        streams = [int.from_bytes(np.ascontiguousarray(row).tobytes(), "little") for row in words]
        return np.array([[stream >> (k * bits) & (2**bits - 1) for k in range(n)] for stream in streams])

    scale = tensors[f"{linear}.weight_scale"].astype(np.float64)
    zero = 2 ** (bits - 1)
    if not weights["symmetric"]:
        zero = codes(tensors[f"{linear}.weight_zero_point"].T, out).T
        zero = np.repeat(zero, inputs // zero.shape[1], axis=1)
    scale = np.repeat(scale, inputs // scale.shape[1], axis=1)
    return (codes(tensors[f"{linear}.weight_packed"], inputs) - zero) * scale


def test_the_file_holds_the_model(tmp_path):
    mixed = folder_of(tmp_path / "q", mixed_kernel)
    calls = []
    result = export_compressed_tensors(mixed, tmp_path / "hf", progress=lambda *call: calls.append(call))
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in set(index["weight_map"].values()):
        tensors |= load_file(tmp_path / "hf" / shard)
    assert tensors.keys() == index["weight_map"].keys()
    assert result["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert calls == [(i + 1, CONFIG.num_layers) for i in range(CONFIG.num_layers)]

    quantization = raw["quantization_config"]
    weights_of = {
        target: group["weights"]
        for group in quantization["config_groups"].values()
        for target in group["targets"]
    }
    assert {w["num_bits"] for w in weights_of.values()} == {2, 3, 4, 8}
    assert sum(result["schemes"].values()) == len(weights_of) == 7 * CONFIG.num_layers - 1
    kept = "model.layers.1.mlp.up_proj"
    assert quantization["ignore"] == ["lm_head", kept]
    for layer in range(CONFIG.num_layers):
        params, _ = checkpoint.load_block(mixed, layer)
        for path, (suffix, transpose) in block_names(CONFIG).items():
            own = params
            for key in path.split("."):
                own = own[key]
            name = f"model.layers.{layer}.{suffix}"
            linear = name.removesuffix(".weight")
            if linear in weights_of:
                found, own = (
                    dense(tensors, linear, weights_of[linear]),
                    np.asarray(own.dequantize(jnp.float32)),
                )
            else:
                assert tensors[name].dtype == np.float16
                found, own = tensors[name], own.astype(np.float16)
            np.testing.assert_allclose(found, own.T if transpose else own, rtol=1e-6, err_msg=name)
    assert from_hf({**raw, "quantization_config": None}).num_layers == CONFIG.num_layers
    words = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert words.encode("w3").ids == [3]


def test_one_scheme_is_for_all_linears(tmp_path):
    folder = folder_of(tmp_path / "q", lambda path, shape: packed(GRID, shape))
    result = export_compressed_tensors(folder, tmp_path / "hf", dtype="bfloat16")
    quantization = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in quantization["config_groups"].values()] == [["Linear"]]
    assert result["schemes"] == {str(GRID): 7 * CONFIG.num_layers}
    with pytest.raises(InputError, match="quantization_config"):  # and cannot be taken for an original
        open_model(str(tmp_path / "hf"))


def fractional(path, shape):
    q = packed(GRID, shape)
    return dataclasses.replace(q, zero=q.zero + np.float16(0.25))


def by_group(path, shape):
    codes, bits = RNG.integers(0, 4, shape).astype(np.uint8), np.array([2, 3] * (shape[0] // 16))
    scale = RNG.uniform(0.01, 0.1, (len(bits), shape[1])).astype(np.float16)
    return MixedQArray.from_codes(codes, scale, scale, Grid(bits=2, group_size=8), bits)


def ordered(path, shape):
    return dataclasses.replace(packed(GRID, shape), order=RNG.permutation(shape[0]).astype(np.int32))


CASES = {
    "dynamic": (ordered, EXACT, r"layers\.0\.self_attn\.q_proj has dynamic groups"),
    "refit": (fractional, EXACT, "fractional zeros.*integer_zero"),
    "groups": (by_group, EXACT, "bits by group"),
    "one bit": (
        lambda path, shape: packed(Grid(bits=1, group_size=16, symmetric=True), shape), EXACT,
        "symmetric grid of 1 bit",
    ),
    "floats": (lambda path, shape: np.ones(shape, np.float32), EXACT, "nothing to export"),
    "cache": (
        lambda path, shape: packed(GRID, shape), Precision(keys=ActivationGrid()),
        "at run time, which the format cannot say",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_the_format_cannot_say_is_refused(case, tmp_path):
    kernel, precision, message = CASES[case]
    folder = folder_of(tmp_path / "q", kernel, precision=precision)
    with pytest.raises(InputError, match=message):
        export_compressed_tensors(folder, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_shards_are_written_as_they_fill(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "q", lambda path, shape: packed(GRID, shape))
    export_compressed_tensors(folder, tmp_path / "one")
    monkeypatch.setattr(compressed_tensors, "_SHARD_BYTES", 1)
    export_compressed_tensors(folder, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) == 1 + CONFIG.num_layers
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(tmp_path / "one" / "model-00001.safetensors")
    assert whole.keys() == index.keys()
    for shard in shards:
        for name, tensor in load_file(shard).items():
            assert index[name] == shard.name
            np.testing.assert_array_equal(tensor, whole[name])


@pytest.mark.parametrize("ends", [(), (5,), (5, 6)])
def test_the_tokenizer_begins_and_ends_as_the_model(ends, tmp_path):
    config = dataclasses.replace(CONFIG, bos_id=2, add_bos=True, eos_ids=ends)
    folder = folder_of(tmp_path / "q", lambda path, shape: packed(GRID, shape), config)
    export_compressed_tensors(folder, tmp_path / "hf")
    assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("w3").ids == [2, 3]
    settings, generation = (
        json.loads((tmp_path / "hf" / name).read_text())
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    assert (settings["bos_token"], settings.get("eos_token")) == ("w2", "w5" if ends else None)
    expected = {(): {}, (5,): {"eos_token_id": 5}, (5, 6): {"eos_token_id": [5, 6]}}
    assert generation == {"bos_token_id": 2, **expected[ends]}


def test_parameters_without_a_name_are_refused(tmp_path):
    folder = folder_of(tmp_path / "q", lambda path, shape: packed(GRID, shape))
    params, _ = checkpoint.load_block(folder, 2)
    params["attn"]["key_shift"] = np.zeros((2, 8), np.float32)
    shutil.rmtree(folder / "blocks" / "002")
    checkpoint.save_block(folder, 2, params, {})
    with pytest.raises(InputError, match=r"model\.layers\.2\.attn\.key_shift has no place"):
        export_compressed_tensors(folder, tmp_path / "hf")


def test_wrong_use_is_refused(tmp_path):
    with pytest.raises(UsageError, match="exists; give another --out"):
        export_compressed_tensors(tmp_path / "q", tmp_path)
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        export_compressed_tensors(tmp_path / "q", tmp_path / "hf", dtype="int8")
    with pytest.raises(InputError, match=r"no jaxquant\.json"):
        export_compressed_tensors(tmp_path, tmp_path / "hf")
    (tmp_path / "q").mkdir()
    folder = folder_of(tmp_path / "q", lambda path, shape: packed(GRID, shape))
    (folder / "blocks" / "002").rename(tmp_path / "lost")
    with pytest.raises(InputError, match="only 2 of 3 blocks are quantized"):
        export_compressed_tensors(folder, tmp_path / "hf")
