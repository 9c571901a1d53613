"""The tasks of bilevel learning as problem classes: each gives the two levels and the outer variables at the start."""

from weingarten.applications.problems.augmentation_range import AugmentationRange, Jittered
from weingarten.applications.problems.auxiliary_weights import AuxiliaryWeights, Joined, masked_rows
from weingarten.applications.problems.inner_rates import FollowedRates, InnerRates
from weingarten.applications.problems.weight_decays import WeightDecays

__all__ = [
    "AugmentationRange",
    "AuxiliaryWeights",
    "FollowedRates",
    "InnerRates",
    "Jittered",
    "Joined",
    "WeightDecays",
    "masked_rows",
]
