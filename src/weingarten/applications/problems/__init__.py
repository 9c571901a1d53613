"""The tasks of bilevel learning as problem classes: each gives the two levels and the outer variables at the start."""

from weingarten.applications.problems.poisoning import Around, Poisoning

__all__ = ["Around", "Poisoning"]
