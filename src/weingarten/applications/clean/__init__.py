"""Finds wrong labels by bilevel reweighting and trains a model that withstands them."""

from weingarten.applications.clean.classifier import Classifier, load_model
from weingarten.applications.clean.errors import UserError
from weingarten.applications.clean.job import Job, finished_seeds, run
from weingarten.applications.clean.noise import Noise
from weingarten.applications.clean.recipe import Cleaned, Settings, clean_labels
from weingarten.applications.clean.source import Request

__all__ = [
    "Classifier",
    "Cleaned",
    "Job",
    "Noise",
    "Request",
    "Settings",
    "UserError",
    "clean_labels",
    "finished_seeds",
    "load_model",
    "run",
]
