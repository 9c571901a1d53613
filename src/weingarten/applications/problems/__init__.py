"""The tasks of bilevel learning as problem classes: each gives the two levels and the outer variables at the start."""

from weingarten.applications.problems.augmentation_range import AugmentationRange, Jittered
from weingarten.applications.problems.auxiliary_weights import AuxiliaryWeights, Joined, masked_rows
from weingarten.applications.problems.episode_networks import Copies, EpisodeNetworks, GroupedMLP
from weingarten.applications.problems.episode_sources import FewShot, Sines, rotated_digits, signal_classes
from weingarten.applications.problems.inner_rates import FollowedRates, InnerRates
from weingarten.applications.problems.meta_learning import HyperRepresentation, ImplicitMAML
from weingarten.applications.problems.meta_loop import (
    Episodes,
    EpisodeSource,
    MetaTask,
    adapt,
    meta_solve,
)
from weingarten.applications.problems.poisoning import Around, Poisoning
from weingarten.applications.problems.row_weights import RowWeights
from weingarten.applications.problems.weight_decays import WeightDecays
from weingarten.applications.problems.weight_network import WeightNetwork

__all__ = [
    "Around",
    "AugmentationRange",
    "AuxiliaryWeights",
    "Copies",
    "EpisodeNetworks",
    "EpisodeSource",
    "Episodes",
    "FewShot",
    "FollowedRates",
    "GroupedMLP",
    "HyperRepresentation",
    "ImplicitMAML",
    "InnerRates",
    "Jittered",
    "Joined",
    "MetaTask",
    "Poisoning",
    "RowWeights",
    "Sines",
    "WeightDecays",
    "WeightNetwork",
    "adapt",
    "masked_rows",
    "meta_solve",
    "rotated_digits",
    "signal_classes",
]
