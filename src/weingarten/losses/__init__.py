"""Loss functions that know their Hessian in the model's output and can sample labels from the model."""

from weingarten.losses.binary import BinaryCrossEntropy
from weingarten.losses.cross_entropy import CrossEntropy
from weingarten.losses.loss import Loss
from weingarten.losses.mse import MSE

__all__ = ["MSE", "BinaryCrossEntropy", "CrossEntropy", "Loss"]
