"""KFAC with eigenvalues corrected by per-datum gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from weingarten.estimators.estimator import Estimator
from weingarten.estimators.factors import KFACState
from weingarten.estimators.kfac import KFAC, check_model
from weingarten.estimators.layerwise import layer_pass
from weingarten.estimators.remaining import Remaining
from weingarten.fisher import Fisher, MonteCarlo
from weingarten.layers import Block, Expand, Sharing
from weingarten.layers.rows import chunks_of_data, sum_of_squares, turned
from weingarten.objective import Batch, Objective
from weingarten.operators import BlockDiagonal, Curvature, Eigenbasis, Kronecker
from weingarten.tree import TreeLike

__all__ = ["EKFAC"]


@dataclass
class EKFACState:
    """The factors of the first pass; then the bases and the running spectrum of the second."""

    kfac: KFACState
    bases: dict[str, Eigenbasis] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    second: bool = False
    count: float = 0.0


@dataclass(frozen=True)
class EKFAC(Estimator):
    r"""KFAC's eigenbasis with the spectrum ``(1/M) sum_n w_n (L^T g_n a_n^T R)^2`` (George et al. 2018).

    In that basis, the diagonal that is closest to the per-layer GGN in Frobenius norm; per-datum gradients sum over positions,
    and over all uses of a weight, exactly. Two passes over the data. https://arxiv.org/abs/1806.03884

    Args:
        fisher: as for :class:`KFAC`.
        sharing: as for :class:`KFAC`, for the bases.
        otherwise: as for :class:`KFAC`.
        widest: as for :class:`KFAC`.
    """

    passes: ClassVar[int] = 2
    fisher: Fisher = MonteCarlo()
    sharing: Sharing = Expand()
    otherwise: Estimator | None = None
    widest: int = 8192

    def init(self, objective: Objective, params: TreeLike) -> EKFACState:
        check_model(objective, params, "EKFAC")
        return EKFACState(KFACState(list(params), objective.loss, Remaining("EKFAC", self.otherwise)))

    def update(
        self,
        state: EKFACState,
        objective: Objective,
        params: TreeLike,
        batch: Batch,
        generator: torch.Generator,
    ) -> EKFACState:
        kfac = state.kfac
        if not state.second:
            self._kfac.update(kfac, objective, params, batch, generator)
            return state
        state.count += objective.loss.count(batch.targets)
        with layer_pass(kfac.structure, objective, params, batch, self.fisher, generator, "EKFAC") as (
            _,
            seen,
        ):

            def consume(block: Block, gradients: list[Tensor]) -> None:
                found = spectrum(block, gradients, state.bases[block.name])
                state.spectra[block.name] = state.spectra[block.name] + found

            seen.backward(consume)
        return state

    def finish(self, state: EKFACState) -> EKFACState:
        """After the first pass, fix the bases; the second pass measures in them."""
        if not state.second:
            found = zip(state.kfac.layouts, self._kfac.blocks(state.kfac), strict=True)
            state.bases = {
                name: curvature.diagonalise() if isinstance(curvature, Kronecker) else curvature
                for name, curvature in found
                if isinstance(curvature, Kronecker | Eigenbasis)
            }
            state.spectra = {name: torch.zeros_like(basis.spectrum) for name, basis in state.bases.items()}
            state.second = True
        return state

    def read(self, state: EKFACState) -> Curvature:
        if state.count == 0:
            raise ValueError(
                "EKFAC.read: the second pass has seen no data; run wg.estimate, or call finish and update again"
            )
        divisor = state.kfac.loss.divisor(state.count)
        blocks: list[Curvature] = [
            Eigenbasis(basis.layout, basis.left, basis.right, state.spectra[name] / divisor)
            for name, basis in state.bases.items()
        ]
        return BlockDiagonal([*blocks, *state.kfac.remaining.read()], state.kfac.order)

    @property
    def _kfac(self) -> KFAC:
        return KFAC(self.fisher, self.sharing, otherwise=self.otherwise, widest=self.widest)


def spectrum(block: Block, gradients: list[Tensor], basis: Eigenbasis | None) -> Tensor:
    """Sum over data and columns of squared per-datum gradients in a basis (None: as they are), ``(groups, out, in)``.

    Args:
        block: the leaves and their uses.
        gradients: rows of output gradients ``(K, groups, N, T, out)`` of each term.
        basis: with the block's layout.
    """
    rows = [term.inputs() for term in block.terms]
    if len(rows) == 1:
        (g,) = gradients
        if basis is None:
            return rows[0].squares(g)
        _, _, data, positions, out = g.shape
        rotate_rows = data * positions * (out**2 + rows[0].width ** 2)
        rotate_gradients = data * out * rows[0].width * (out + rows[0].width)
        if positions == 1 or rotate_rows < rotate_gradients or basis.right is None:
            return rows[0].rotated(basis.right).squares(turned(g, basis.left))

    def gradients_of(data: slice) -> Tensor:
        whole: Tensor | None = None  # (K, groups, n, out, in)
        for term, a, g in zip(block.terms, rows, gradients, strict=True):
            part = a.gradients(g, data)
            part = part.mT if term.flipped else part
            whole = part if whole is None else whole + part
        assert whole is not None
        return whole if basis is None else _rotated(basis, whole)

    return sum_of_squares(gradients_of(data) for data in chunks_of_data(gradients[0], rows[0].width))


def _rotated(basis: Eigenbasis, w: Tensor) -> Tensor:
    """``L^T W R`` of per-datum gradients ``(K, groups, n, out, in)``."""
    w = w if basis.left is None else basis.left.mT.unsqueeze(1) @ w
    return w if basis.right is None else w @ basis.right.unsqueeze(1)
