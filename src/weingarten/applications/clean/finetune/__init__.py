"""Trains the encoder of texts together with the head, by what cleaning with a frozen encoder has found."""

from weingarten.applications.clean.finetune.run import ROUNDS, fine_tune

__all__ = ["ROUNDS", "fine_tune"]
