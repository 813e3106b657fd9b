from __future__ import annotations

import importlib
import sys

import pytest

from jaxquant.errors import InputError


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jaxquant.evaluate.lm_eval", raising=False)
    with pytest.raises(InputError, match=r"jaxquant\[lm-eval\]"):
        importlib.import_module("jaxquant.evaluate.lm_eval")
