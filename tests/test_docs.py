"""The examples of README and docs run as they stand, and the public names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jaxquant

ROOT = Path(__file__).resolve().parents[1]


PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(
    "page", ["README.md", *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES)]
)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})


def test_public_names_exist():
    for name in jaxquant.__all__:
        assert getattr(jaxquant, name) is not None
    assert set(jaxquant.__all__) <= set(dir(jaxquant))
    with pytest.raises(AttributeError, match="no attribute 'gtpq'"):
        jaxquant.gtpq  # noqa: B018


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert "pip install -q . && .venv/bin/jaxquant demo" in readme
    assert ".venv/bin/python -m pytest -n 2" in readme
