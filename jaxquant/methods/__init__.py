"""One paper, one file: pure functions on arrays."""

from jaxquant.methods.awq import awq, awq_scale
from jaxquant.methods.coordinate import coordinate_descent
from jaxquant.methods.fine import backward_error, loss_descent, two_sided_descent
from jaxquant.methods.gptq import gptq
from jaxquant.methods.magr import linf_prox, magr
from jaxquant.methods.offq import offq
from jaxquant.methods.osaq import osaq, osaq_delta, osaq_kernel, osaq_primal, osaq_top, softmax_infinity
from jaxquant.methods.problem import Problem
from jaxquant.methods.qep import qep
from jaxquant.methods.refit import better_columns, refit_grid
from jaxquant.methods.rotate import Rotations, fold_norms, quarot, rotate
from jaxquant.methods.rounded import Rounded, Stats, layer_error
from jaxquant.methods.rtn import rtn
from jaxquant.methods.spin import cayley_step, spin
from jaxquant.methods.tasa import (
    aggregate,
    allocate,
    allocate_lagrangian,
    group_salience,
    isotonic,
    kendall_interval,
    normalize,
    salience_swap,
)
from jaxquant.methods.tune import tune_scales

__all__ = [
    "Problem",
    "Rotations",
    "Rounded",
    "Stats",
    "aggregate",
    "allocate",
    "allocate_lagrangian",
    "awq",
    "awq_scale",
    "backward_error",
    "better_columns",
    "cayley_step",
    "coordinate_descent",
    "fold_norms",
    "gptq",
    "group_salience",
    "isotonic",
    "kendall_interval",
    "layer_error",
    "linf_prox",
    "loss_descent",
    "magr",
    "normalize",
    "offq",
    "osaq",
    "osaq_delta",
    "osaq_kernel",
    "osaq_primal",
    "osaq_top",
    "qep",
    "quarot",
    "refit_grid",
    "rotate",
    "rtn",
    "salience_swap",
    "softmax_infinity",
    "spin",
    "tune_scales",
    "two_sided_descent",
]
