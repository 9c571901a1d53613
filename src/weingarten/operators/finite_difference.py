"""Products with the Hessian from differences of gradients, for models without a second derivative."""

from __future__ import annotations

from typing import final

import torch

from weingarten import tree
from weingarten.objective import Batch, Data, Objective, graph_nodes
from weingarten.operators.exact import BatchSum, one_sided
from weingarten.tree import Tree, TreeLike

__all__ = ["FiniteDifferenceHessian"]


@final
class FiniteDifferenceHessian(BatchSum):
    r"""``v -> (grad g(p + h v) - grad g(p - h v)) / (2 h)``, the Hessian's product up to ``O(h^2)``, by first derivatives.

    For models whose backward pass cannot be differentiated again. The step is ``h = step (1 + |p|) / |v|``: the parameters
    move by ``step`` of their norm, whatever the length of v. The truncation error grows as ``h^2`` and that of rounding as
    ``eps / h``, so that their sum is smallest at ``step = eps^(1/3)`` (Nocedal and Wright 2006, section 8.1,
    https://doi.org/10.1007/978-0-387-40065-5): eight digits in float64, and three in float32. The product is linear and
    symmetric up to these errors; :meth:`error` estimates them. It costs two gradients.

    A difference sees what the model computes. A kink (ReLU) within the step counts as curvature, and parameters whose
    gradient the model holds back (``detach``, ``torch.no_grad``) move all the same: for such a model this is not a Hessian,
    nor symmetric.

    Args:
        objective: model and loss.
        data: batches, iterated once for every product; a list or a DataLoader, not an iterator.
        params: where the curvature is taken; default: the module's trainable parameters.
        step: relative length of the move; default: the cube root of the machine precision of the coarsest leaf.

    Raises:
        TypeError: for leaves of less than 32 bits, whose gradients leave no digit to a difference.
        ValueError: if ``step`` is not positive; from ``apply``, for an embedding with a padding index or with gradients scaled by
            frequency, whose backward pass leaves out what a difference sees.

    >>> from weingarten.losses import MSE
    >>> objective = Objective(lambda params, x: x @ params["w"], MSE())
    >>> hessian = FiniteDifferenceHessian(objective, [(torch.eye(2), torch.zeros(2, 1))], {"w": torch.zeros(2, 1)})
    >>> hessian.dense().round(decimals=3)
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(
        self, objective: Objective, data: Data, params: TreeLike | None = None, step: float | None = None
    ) -> None:
        super().__init__(objective, data, params)
        precision = max(torch.finfo(dtype).eps for dtype in self.space.dtypes.values())
        if precision > torch.finfo(torch.float32).eps:
            found = sorted({str(dtype) for dtype in self.space.dtypes.values()})
            raise TypeError(
                f"FiniteDifferenceHessian: the parameters are {', '.join(found)}, expected float32 or float64; convert the model "
                "and its data, or use Hessian"
            )
        self.step = precision ** (1 / 3) if step is None else step
        if not self.step > 0:
            raise ValueError(
                f"FiniteDifferenceHessian: step is {step}, expected > 0, or None for the default"
            )

    def error(self, v: TreeLike) -> float:
        """``|D(2 h) v - D(h) v| / |D(h) v|``, an estimate of the product's relative error at the cost of two products.

        Where truncation rules it is three times the error, to leading order; where rounding rules, it is of the error's size.
        Zero for a zero product.
        """
        found = self.apply(v)
        wide = FiniteDifferenceHessian(self.objective, self.data, self.params, 2 * self.step).apply(v)
        size = float(tree.norm(found))
        return float(tree.norm(tree.sub(wide, found))) / size if size else 0.0

    def _product(self, batch: Batch, v: Tree) -> Tree:
        length = float(tree.norm(v))
        if length == 0:
            return tree.zeros_like(self.params)
        h = self.step * (1 + float(tree.norm(self.params))) / length
        ahead, behind = (self._gradient(batch, tree.axpy(s, v, self.params)) for s in (h, -h))
        return tree.scale(1 / (2 * h), tree.sub(ahead, behind))

    def _gradient(self, batch: Batch, params: Tree) -> Tree:
        """The gradient of one batch's share of the loss."""
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            value = self.objective.total(params, batch) / self._divisor
            if not value.requires_grad:
                return tree.zeros_like(self.params)
            if any(one_sided(node) for node in graph_nodes(value)):
                raise ValueError(
                    "FiniteDifferenceHessian.apply: found an embedding with padding_idx or scale_grad_by_freq, whose "
                    "gradient is not the derivative of its output; use Hessian"
                )
            found = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
        return dict(zip(params, found, strict=True))
