"""What `open_model` accepts, and the memory that loading takes."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest
from model_files import write_huggingface
from tiny_families import RAW, tiny_config, tiny_params

from jaxquant.errors import InputError, UsageError
from jaxquant.io import open_model
from jaxquant.models.families import from_hf


def test_unknown_spec_lists_what_is_accepted():
    with pytest.raises(UsageError, match=r"smollm2-136m.*smollm2-135m.*config\.json.*\.gguf.*owner/name"):
        open_model("smollm2-136m")


@pytest.mark.parametrize("spec", ["/no/such/folder", "./absent", "absent.gguf"])
def test_missing_path(spec):
    with pytest.raises(InputError, match="no such file or directory"):
        open_model(spec)


def test_other_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"must be a \.gguf file"):
        open_model(str(tmp_path / "model.bin"))


def test_names(tmp_path):
    write_huggingface(tmp_path / "folder", RAW["llama2"], tiny_params(tiny_config("llama2")))
    assert open_model(str(tmp_path / "folder")).name == "folder"


def test_hub_extra_missing(monkeypatch):
    original = builtins.__import__

    def without_hub(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(InputError, match=r"pip install 'jaxquant\[hub\]'"):
        open_model("owner/name")


def test_hub_offline(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"owner/name: cannot be fetched.*no route.*local directory"):
        open_model("owner/name")


def test_hub_snapshot(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    write_huggingface(tmp_path, RAW["llama2"], tiny_params(tiny_config("llama2")))
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert open_model("owner/name").name == "owner/name"


_LOAD = """
import resource, sys
import jax
from jaxquant.io import load_params, open_model
source = open_model(sys.argv[1])
source.block(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = load_params(source)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20)
"""


@pytest.mark.slow
def test_loading_takes_the_result_and_about_one_block(tmp_path):
    # 12 blocks of 7 MiB: holding all of them twice, or the mapped file beside them, would show.
    raw = {**RAW["llama2"], "hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 12}
    write_huggingface(tmp_path, raw, tiny_params(from_hf(raw)), shards=2)
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, result = map(float, run.stdout.split())
    assert grown < result + 3 * result / 12
