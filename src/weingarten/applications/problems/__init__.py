"""The tasks of bilevel learning as problem classes: each gives the two levels and the outer variables at the start."""

from weingarten.applications.problems.episode_networks import Copies, EpisodeNetworks, GroupedMLP
from weingarten.applications.problems.episode_sources import FewShot, Sines, rotated_digits, signal_classes
from weingarten.applications.problems.meta_learning import HyperRepresentation, ImplicitMAML
from weingarten.applications.problems.meta_loop import (
    Episodes,
    EpisodeSource,
    MetaOutcome,
    MetaTask,
    adapt,
    meta_solve,
)

__all__ = [
    "Copies",
    "EpisodeNetworks",
    "EpisodeSource",
    "Episodes",
    "FewShot",
    "GroupedMLP",
    "HyperRepresentation",
    "ImplicitMAML",
    "MetaOutcome",
    "MetaTask",
    "Sines",
    "adapt",
    "meta_solve",
    "rotated_digits",
    "signal_classes",
]
