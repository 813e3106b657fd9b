"""Exported models as transformers and compressed-tensors read them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_folder import folder_of, mixed_kernel, packed
from tiny_families import RAW, tiny_config, tiny_tokens

from jaxquant.io import checkpoint, load_checkpoint
from jaxquant.io.export import export_compressed_tensors
from jaxquant.models.decoder import forward
from jaxquant.models.families import block_names
from jaxquant.quant import Grid

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
load_file = pytest.importorskip("safetensors.torch").load_file

GRIDS = {"W4": Grid(bits=4, group_size=16), "W5 symmetric": Grid(bits=5, symmetric=True)}
CASES = [("llama3", "W4"), *(pytest.param(name, "W4", marks=pytest.mark.slow) for name in RAW)]
CASES += [pytest.param("qwen3", "W5 symmetric", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_logits_of_an_exported_model(name, grid, tmp_path):
    folder = folder_of(tmp_path / "q", lambda path, shape: packed(GRIDS[grid], shape), tiny_config(name))
    export_compressed_tensors(folder, tmp_path / "hf", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )  # fmt: skip
    tokens = tiny_tokens(name)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    params, config = load_checkpoint(folder)
    with jax.default_matmul_precision("highest"):
        ours = forward(params, config, jnp.asarray(tokens)).logits
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.filterwarnings("ignore")
def test_every_linear_finds_its_own_scheme(tmp_path):
    """transformers dequantizes models of one scheme only; the library behind it knows many."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = tiny_config("llama3")
    folder = folder_of(tmp_path / "q", mixed_kernel, config)
    export_compressed_tensors(folder, tmp_path / "hf", dtype="float32")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    schemes = raw.pop("quantization_config")
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**raw))
    apply_quantization_config(model, QuantizationConfig.model_validate(schemes))
    compressor = BaseCompressor.get_value_from_registry(schemes["format"])
    tensors = load_file(tmp_path / "hf" / "model-00001.safetensors")
    linears = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    assert len(linears) == 7 * config.num_layers - 1
    names = {suffix.removesuffix(".weight"): path for path, (suffix, _) in block_names(config).items()}
    for linear in linears:
        own = {key.removeprefix(f"{linear}."): value for key, value in tensors.items() if linear in key}
        found = compressor.decompress(own, model.get_submodule(linear).quantization_scheme)["weight"]
        _, _, layer, suffix = linear.split(".", 3)
        part, name, _ = names[suffix].split(".")
        kernel = checkpoint.load_block(folder, int(layer))[0][part][name]["kernel"]
        np.testing.assert_allclose(found.numpy(), np.asarray(kernel.dequantize(jnp.float32)).T, rtol=1e-6)
