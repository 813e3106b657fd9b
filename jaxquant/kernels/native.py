"""C++ kernels for the CPU: built with the system's compiler on first use, kept in the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib

from jaxquant.cache import cache_dir

# Without its own choice of a contraction GCC would compile ISO C++ to a product and a sum.
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-w", "-shared", "-fPIC")
_HEADER = Path(__file__).with_suffix(".h")
_TIMEOUT = 300

# A build that failed is tried again where another compiler may be found.
_libraries: dict[Path, ctypes.CDLL] = {}
_failed: set[tuple[Path, str | None, str | None]] = set()
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def _registered(source: Path, targets: tuple[tuple[str, str], ...]) -> bool:
    tried = (source, os.environ.get("CXX"), os.environ.get("PATH"))
    with _lock:
        if source not in _libraries and tried not in _failed:
            library = load(source)
            if library is None:
                _failed.add(tried)
                return False
            for target, symbol in targets:
                capsule = jax.ffi.pycapsule(getattr(library, symbol))
                jax.ffi.register_ffi_target(target, capsule, platform="cpu")
            _libraries[source] = library
    return source in _libraries


def missing(source: Path, targets: tuple[tuple[str, str], ...]) -> str:
    """Why XLA cannot call a C++ file; "" where it can, after a build if need be.

    Args:
      source: of the file.
      targets: names for XLA, and the symbols of the file that they stand for.
    """
    if os.environ.get("JAXQUANT_NATIVE") == "0":
        return "JAXQUANT_NATIVE is 0"
    if not _registered(source, targets):
        return (
            "it could not be built: it needs a C++ compiler (set CXX) and a cache folder that can be written "
            "(JAXQUANT_CACHE)"
        )
    return ""


def load(source: Path) -> ctypes.CDLL | None:
    """The library built from a C++ file against the headers of `jax.ffi`; `None` where that is impossible.

    The compiler is `CXX`, else `c++`, `g++` or `clang++`. The result is kept in `cache_dir()` under a name
    that holds two digests: of all that it depends on (the source, `native.h`, flags, jaxlib, and what the
    compiler predefines, which tells its version and the features of this CPU) and of its own bytes, so that a
    damaged file is noticed and built again. No reason to fail is an error: one line is logged at debug level.
    """
    try:
        return _load(source)
    except (OSError, RuntimeError, subprocess.SubprocessError, ValueError) as error:  # Runtime: no home
        _log.debug("no native kernel from %s: %s", source.name, error)
        return None


def _load(source: Path) -> ctypes.CDLL:
    command = [*_compiler(), *_FLAGS]
    predefined = _run([*command, "-E", "-dM", "-x", "c++", os.devnull])
    sources = (source.read_bytes(), _HEADER.read_bytes())
    parts = (*sources, predefined, " ".join(command).encode(), jaxlib.__version__.encode())
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    prefix = f"{source.parent.name}-{source.stem}-{key}"
    folder = cache_dir() / "kernels"
    for built in folder.glob(f"{prefix}-*.so"):
        if built.stem == f"{prefix}-{_digest(built)}":
            return ctypes.CDLL(str(built))
        with contextlib.suppress(OSError):  # another process may have noticed, too
            built.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        part = Path(scratch) / "kernel.so"
        includes = [f"-I{folder}" for folder in (_HEADER.parent, jax.ffi.include_dir())]
        _run([*command, *includes, str(source), "-o", str(part)])
        target = folder / f"{prefix}-{_digest(part)}.so"
        os.replace(part, target)
    return ctypes.CDLL(str(target))


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [chosen[0]] if chosen else ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return [found, *chosen[1:]]
    raise FileNotFoundError(f"no C++ compiler ({', '.join(names)})")


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT).stdout


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
