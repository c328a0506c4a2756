"""Muon for convolutional networks: steps in which every direction of a weight matrix is as long as every other."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of the quintic iteration in Jordan's Muon: the steepest at zero, so that small singular values grow in few steps.
QUINTIC = (3.4445, -4.7750, 2.0315)
# Iterations multiplied into one matrix. Of more, rounding (bf16, TF32) makes eigenvalues below zero, which the next ones blow up.
AT_ONCE = 3


class Muon(Optimizer):
    """Muon for the weights of convolutions, Nesterov SGD for all other parameters.

    The weight of a convolution (out, in, h, w) is a matrix of `out` rows here. It is first brought back to the norm
    sqrt(out), and then moves by `lr` times its Nesterov momentum (`muon_momentum`), made orthogonal by `newton_schulz_steps`
    iterations. Only for networks whose convolutions are followed by batch norm, to which their scale is nothing.
    The other parameters have `lr` times `sgd_lr_factor`, `momentum` and `weight_decay`.

    Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024), in the form of Jordan's airbench94_muon.
    torch.optim.Muon takes matrices alone, and computes in bf16, which is slow on processors without bf16 instructions.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        muon_momentum: float = 0.6,
        newton_schulz_steps: int = 3,
        sgd_lr_factor: float = 3.0,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "muon_momentum": muon_momentum,
                "newton_schulz_steps": newton_schulz_steps,
                "sgd_lr_factor": sgd_lr_factor,
                "momentum": momentum,
                "weight_decay": weight_decay,
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; a closure is not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                if parameter.ndim == 4:
                    step = _nesterov(parameter.grad, buffer, group["muon_momentum"])
                    matrix = orthogonal(step.flatten(1), group["newton_schulz_steps"])
                    # Zeros have no norm, with which the last convolution of some residual branches starts.
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp_min(1e-7))
                    parameter.sub_(matrix.view_as(step), alpha=group["lr"])
                else:
                    gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                    step = _nesterov(gradient, buffer, group["momentum"])
                    parameter.sub_(step, alpha=group["lr"] * group["sgd_lr_factor"])


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """The matrix (M, N) with its singular values brought towards 1, by `steps` Newton-Schulz iterations; float32.

    An iteration multiplies the matrix X by a polynomial of X X^T. The polynomials are small, square, and commute: the
    product of up to `AT_ONCE` is made first, and X multiplied once, which saves half of the work.
    """
    wide = matrix.float() if len(matrix) <= matrix.shape[1] else matrix.float().T
    wide = wide / (wide.norm() + 1e-7)
    for done in range(0, steps, AT_ONCE):
        wide = _polynomials(wide @ wide.T, min(AT_ONCE, steps - done)) @ wide
    return wide if len(matrix) <= matrix.shape[1] else wide.T


def _polynomials(gram: Tensor, steps: int) -> Tensor:
    a, b, c = QUINTIC
    identity = polynomial = product = torch.eye(len(gram), device=gram.device)
    for step in range(steps):
        if step:
            gram = polynomial @ gram @ polynomial
        polynomial = torch.addmm(a * identity + b * gram, gram, gram, alpha=c)
        product = polynomial @ product
    return product


def _nesterov(gradient: Tensor, buffer: Tensor, momentum: float) -> Tensor:
    buffer.mul_(momentum).add_(gradient)
    return gradient.add(buffer, alpha=momentum)
