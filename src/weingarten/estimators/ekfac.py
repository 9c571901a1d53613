"""KFAC with eigenvalues corrected by per-datum gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weingarten.estimators.estimator import Estimator
from weingarten.estimators.kfac import KFAC, KFACState, backward, check_finite
from weingarten.fisher import Fisher, MonteCarlo
from weingarten.layers import Expand, Sharing, capture, factor_type
from weingarten.objective import Batch, Objective
from weingarten.operators import BlockDiagonal, Curvature, Eigenbasis, Kronecker
from weingarten.tree import TreeLike

__all__ = ["EKFAC"]


@dataclass
class EKFACState:
    """The factors of the first pass; then the bases and the running spectrum of the second."""

    kfac: KFACState
    bases: dict[str, Eigenbasis] | None = None
    spectra: dict[str, Tensor] | None = None
    count: float = 0.0


@dataclass(frozen=True)
class EKFAC(Estimator):
    r"""KFAC's eigenbasis with the spectrum ``(1/M) sum_n w_n (L^T g_n a_n^T R)^2`` (George et al. 2018).

    In that basis, the diagonal that is closest to the per-layer GGN in Frobenius norm; per-datum gradients sum over positions
    exactly. Two passes over the data. https://arxiv.org/abs/1806.03884

    Args:
        fisher: as for :class:`KFAC`.
        sharing: as for :class:`KFAC`, for the bases.
        otherwise: as for :class:`KFAC`.
    """

    passes: ClassVar[int] = 2
    fisher: Fisher = MonteCarlo()
    sharing: Sharing = Expand()
    otherwise: Estimator | None = None

    def init(self, objective: Objective, params: TreeLike) -> EKFACState:
        return EKFACState(self._kfac.init(objective, params))

    def update(
        self,
        state: EKFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> EKFACState:
        if state.bases is None or state.spectra is None:
            self._kfac.update(state.kfac, objective, params, batch, generator)
            return state
        state.count += objective.loss.count(batch.targets)
        if not state.kfac.blocks:
            return state
        with capture(objective, params, batch, state.kfac.blocks) as seen:
            rows = {
                block.name: block.rule.inputs(
                    block.module, factor_type(seen.seen[block.name][0]), block.leaves(params)
                )
                for block in state.kfac.blocks
            }
            for block, g in backward(
                seen, objective, params, batch, state.kfac.blocks, self.fisher, generator
            ):
                state.spectra[block.name] += rows[block.name].spectrum(state.bases[block.name], g)
        return state

    def finish(self, state: EKFACState) -> EKFACState:
        """After the first pass, fix the bases; the second pass measures in them."""
        if state.bases is None:
            check_finite(state.kfac)
            state.bases = {
                block.name: Kronecker(
                    block.layout, state.kfac.inputs[block.name], state.kfac.outputs[block.name]
                ).diagonalise()
                for block in state.kfac.blocks
            }
            state.spectra = {name: torch.zeros_like(basis.spectrum) for name, basis in state.bases.items()}
        return state

    def read(self, state: EKFACState) -> Curvature:
        if state.bases is None or state.spectra is None or state.count == 0:
            raise ValueError(
                "EKFAC.read: the second pass has seen no data; run wg.estimate, or call finish and update again"
            )
        blocks: list[Curvature] = [
            Eigenbasis(basis.layout, basis.left, basis.right, state.spectra[name] / state.count)
            for name, basis in state.bases.items()
        ]
        return BlockDiagonal([*blocks, *self._kfac.read_rest(state.kfac)], state.kfac.order)

    @property
    def _kfac(self) -> Any:
        return KFAC(self.fisher, self.sharing, otherwise=self.otherwise)
