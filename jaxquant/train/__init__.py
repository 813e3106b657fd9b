"""Training with rounded weights (QAT): straight-through grids, distillation, smoothness losses."""

from jaxquant.train.latent import Latent, latent_params, merge, packed_params, split
from jaxquant.train.loop import State, Training, train, train_step
from jaxquant.train.losses import (
    Response,
    gradient_loss,
    layer_loss,
    neighborhood_loss,
    prediction_loss,
    respond,
    stream_loss,
)
from jaxquant.train.run import train_model

__all__ = [
    "Latent",
    "Response",
    "State",
    "Training",
    "gradient_loss",
    "latent_params",
    "layer_loss",
    "merge",
    "neighborhood_loss",
    "packed_params",
    "prediction_loss",
    "respond",
    "split",
    "stream_loss",
    "train",
    "train_model",
    "train_step",
]
