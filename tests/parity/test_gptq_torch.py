"""Our GPTQ against the published algorithm (arXiv 2210.17323) written column by column in torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate.moments import observe
from jaxquant.methods import gptq
from jaxquant.quant import Grid


def torch_gptq(w, h, *, bits: int, group: int, act_order: bool, percdamp: float = 0.01, block: int = 128):
    """Integers `[out, in]` of an `[out, in]` weight: static groups, min-max grids, float16 scales."""
    import torch  # here and not above: every test process collects every file

    w, h, top = w.clone(), h.clone(), 2**bits - 1
    out, rows = w.shape
    parts = w.reshape(out, -1, group)
    lo, hi = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((hi - lo) / top).half().to(w.dtype)
    zero = torch.round(-lo / scale).clamp(0, top)

    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(rows)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(percdamp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.zeros_like(w)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        errors = torch.zeros_like(w[:, start:stop])
        for k in range(start, stop):
            s, z = scale[:, order[k] // group], zero[:, order[k] // group]
            codes[:, k] = torch.clamp(torch.round(w[:, k] / s) + z, 0, top)
            error = (w[:, k] - s * (codes[:, k] - z)) / upper[k, k]
            w[:, k:stop] -= torch.outer(error, upper[k, k:stop])
            errors[:, k - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes[:, torch.argsort(order)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group", "act_order"), [(4, 64, True), (3, 32, False), (2, 192, True)], ids=["w4", "w3", "w2 pc"]
)
def test_integers_equal_torch(bits, group, act_order):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(bits)
    rows, out = 192, 64
    x = rng.standard_normal((600, rows)) @ (np.eye(rows) + rng.standard_normal((rows, rows)) / rows**0.5)
    w = rng.standard_normal((rows, out)).astype(np.float32)
    moments = observe(jnp.asarray(x, jnp.float32))
    theirs = torch_gptq(
        torch.from_numpy(w.T.copy()),
        torch.from_numpy(np.asarray(moments.second).copy()),
        bits=bits,
        group=group,
        act_order=act_order,
    )
    ours = gptq(jnp.asarray(w), moments, Grid(bits=bits, group_size=group), act_order=act_order)
    mismatch = np.mean(np.asarray(ours.codes) != theirs.numpy().T)
    assert mismatch <= (2e-3 if act_order else 1e-3)
