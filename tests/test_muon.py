"""Muon: orthogonal steps for convolutions, torch's own Nesterov SGD for everything else."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from resnet_cifar.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 27), (64, 16), (1, 9)])
def test_singular_values_come_near_one(shape):
    # The QR decomposition gives singular vectors, so that the values are known: from 0.1 to 1.
    generator = torch.Generator().manual_seed(0)
    least = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, least, generator=generator)).Q for size in shape)
    values = torch.linspace(0.1, 1, least)
    made = orthogonal(left * values @ right.T, steps=5)
    assert made.shape == shape
    after = torch.linalg.svdvals(made)
    assert after.min() > 0.6 and after.max() < 1.3
    # The directions stay what they were: what is made is the nearest orthogonal matrix, but for the values' spread.
    assert torch.allclose(left.T @ made @ right, torch.diag((left.T @ made @ right).diag()), atol=1e-4)


def test_the_product_of_polynomials_is_the_iteration_itself():
    start = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = start / start.norm()
    for _ in range(3):
        gram = expected @ expected.T
        expected = 3.4445 * expected - 4.7750 * gram @ expected + 2.0315 * gram @ gram @ expected
    assert torch.allclose(orthogonal(start, 3), expected.float(), atol=1e-5)


class Bf16Products(TorchFunctionMode):
    """Rounds what is multiplied to bf16 and sums in float32, as processors with bf16 instructions do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [factor.bfloat16().float() for factor in args]
        elif function is torch.addmm:
            args = [args[0], *(factor.bfloat16().float() for factor in args[1:])]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
def test_rounding_to_bf16_does_not_grow_over_the_iterations(steps):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 64, generator=generator)).Q for size in (64, 288))
    with Bf16Products():
        made = orthogonal(left * torch.logspace(0, -4, 64) @ right.T, steps)
    assert torch.linalg.svdvals(made).max() < 1.5


def test_a_convolution_keeps_its_norm_and_moves_by_the_learning_rate():
    convolution = nn.Conv2d(4, 8, 3, bias=False)
    optimizer = Muon(convolution.parameters(), lr=0.1, newton_schulz_steps=5)
    convolution.weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    before = convolution.weight.detach() * (8**0.5 / convolution.weight.detach().norm())
    optimizer.step()
    step = torch.linalg.svdvals((before - convolution.weight.detach()).flatten(1))
    assert step.min() > 0.05 and step.max() < 0.13


def test_a_convolution_that_starts_as_zeros_begins_to_move():
    convolution = nn.Conv2d(3, 8, 3)
    nn.init.zeros_(convolution.weight)
    convolution(torch.ones(1, 3, 4, 4)).sum().backward()
    Muon(convolution.parameters(), lr=0.1).step()
    assert 0 < convolution.weight.norm() < 1


def test_the_scale_of_a_gradient_is_nothing_to_a_convolution():
    weights = []
    for scale in (1.0, 1000.0):
        convolution = nn.Conv2d(4, 8, 3, bias=False)
        nn.init.ones_(convolution.weight)
        convolution.weight.grad = scale * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        Muon(convolution.parameters(), lr=0.1).step()
        weights.append(convolution.weight.detach())
    assert torch.allclose(*weights, atol=1e-4)


def test_all_other_parameters_move_as_by_torchs_nesterov_sgd():
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    muon = Muon(ours.parameters(), lr=0.02, sgd_lr_factor=5, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    images = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, optimizer in ((ours, muon), (theirs, sgd)):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_going_on_from_a_saved_state_is_going_on():
    def trained(steps, model, optimizer):
        for step in range(*steps):
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    def new():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
        return model, Muon(model.parameters(), lr=0.05)

    whole, half, rest = new(), new(), new()
    trained((0, 4), *whole)
    trained((0, 2), *half)
    for part, saved in zip(rest, half, strict=True):
        part.load_state_dict(saved.state_dict())
    trained((2, 4), *rest)
    for one, other in zip(whole[0].parameters(), rest[0].parameters(), strict=True):
        assert torch.equal(one, other)
