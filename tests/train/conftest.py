"""A small teacher, and its student rounded to nearest at 2 bits."""

from __future__ import annotations

import jax
import pytest
from small_model import CONFIG

from jaxquant.models.init import init_params
from jaxquant.quant import Grid
from jaxquant.train import latent_params


@pytest.fixture(scope="session")
def grid():
    return Grid(bits=2, group_size=16, clip="mse")


@pytest.fixture(scope="session")
def teacher():
    return init_params(jax.random.key(0), CONFIG), CONFIG


@pytest.fixture(scope="session")
def student(teacher, grid):
    return latent_params(teacher[0], grid), CONFIG
