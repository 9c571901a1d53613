"""What a group does on one axis of a tensor, or on two axes at once."""

from weingarten.groups.action import Action, Kind
from weingarten.groups.conjugated import Conjugated
from weingarten.groups.irreducible import Rotation, SignedPermutation
from weingarten.groups.permutation import Permutation
from weingarten.groups.signs import Signs
from weingarten.groups.wreath import Wreath

GROUPS: dict[str, type[Action]] = {
    "permutation": Permutation,
    "signed-permutation": SignedPermutation,
    "signs": Signs,
    "rotation": Rotation,
    "wreath": Wreath,
    "conjugated": Conjugated,
}
"""The table, for the contract test."""

__all__ = [
    "GROUPS",
    "Action",
    "Conjugated",
    "Kind",
    "Permutation",
    "Rotation",
    "SignedPermutation",
    "Signs",
    "Wreath",
]
