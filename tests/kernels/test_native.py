"""What is built with the system's compiler: kept, checked, and never a reason to fail."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import pytest

from jaxquant.kernels import native

SOURCE = 'extern "C" int answer() { return 42; }\n'

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "op" / "cpu.cc"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def built(source):
    return sorted((source.parents[1] / "cache" / "kernels").iterdir())


def test_is_built_once(source, monkeypatch):
    library = native.load(source)
    assert library is not None
    assert library.answer() == 42
    (first,) = built(source)
    made = first.stat().st_mtime_ns
    assert native.load(source) is not None
    assert [path.stat().st_mtime_ns for path in built(source)] == [made]
    source.write_text(SOURCE.replace("42", "43"))
    other = native.load(source)
    assert other is not None
    assert other.answer() == 43
    assert len(built(source)) == 2


@pytest.mark.parametrize("damage", [b"", b"no library", None])
def test_damaged_file_is_built_again(source, damage):
    native.load(source)
    (kept,) = built(source)
    whole = kept.read_bytes()
    # A new file: the old one is mapped into this process.
    kept.unlink()
    kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    library = native.load(source)
    assert library is not None
    assert library.answer() == 42
    assert len(built(source)) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", f"{sys.executable} -c raise", "'"])
def test_without_a_compiler(source, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.DEBUG):
        assert native.load(source) is None
    assert len(caplog.records) == 1
    assert "cpu.cc" in caplog.text


def test_without_a_path(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert native.load(source) is None


def test_source_that_does_not_compile(source):
    source.write_text("int answer( {")
    assert native.load(source) is None
    assert built(source) == []


def test_cache_that_cannot_be_written(source, monkeypatch):
    monkeypatch.setenv("JAXQUANT_CACHE", str(source))
    assert native.load(source) is None


@pytest.mark.slow
def test_two_processes_at_once(source):
    code = (
        f"from pathlib import Path; from jaxquant.kernels import native; "
        f"assert native.load(Path({str(source)!r})).answer() == 42"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert {path.suffix for path in built(source)} == {".so"}
