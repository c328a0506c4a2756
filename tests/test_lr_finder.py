"""The range test: torch-lr-finder's own grid, on a copy, without a trace; and the three ways to choose from its curve."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from resnet_cifar.errors import DivergedError
from resnet_cifar.lr_finder import RangeTest, range_test, suggest

REFERENCE_LR = 0.013530477745798068  # the assignment's, the 57th of its grid


class Noisy(nn.Module):
    """A small network that draws from torch's global generator and keeps running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, images):
        return self.layers(images)


def batches(count=None, nan_from=None):
    generator = torch.Generator().manual_seed(0)
    for number in itertools.count() if count is None else range(count):
        # As an augmentation of a user's own might.
        random.random(), np.random.rand(), torch.rand(1)
        images = torch.randn(16, 3, 2, 2, generator=generator)
        if nan_from is not None and number >= nan_from:
            images = images * float("nan")
        yield images, torch.randint(3, (16,), generator=generator)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Noisy()


@pytest.fixture
def optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def run(model, optimizer, batches, **changes):
    given = {"end_lr": 0.1, "num_iter": 100, "step_mode": "exp", "precision": "fp32", **changes}
    return range_test(model, optimizer, batches, **given)


def test_the_grid_is_the_references(model, optimizer):
    curve = run(model, optimizer, batches())
    assert len(curve.lrs) == len(curve.losses) == 100
    assert curve.lrs[56] == REFERENCE_LR
    assert curve.lrs[-1] == pytest.approx(0.1)


def test_a_linear_grid_has_equal_steps(model, optimizer):
    curve = run(model, optimizer, batches(), step_mode="linear", num_iter=10)
    np.testing.assert_allclose(np.diff(curve.lrs), np.diff(curve.lrs)[0])


def test_model_optimizer_and_every_random_generator_are_untouched(model, optimizer):
    nn.functional.cross_entropy(model(torch.randn(4, 3, 2, 2)), torch.zeros(4, dtype=torch.long)).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(model, optimizer, batches(), num_iter=5)
    after = model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    assert random.getstate() == generators[2]
    assert model.training and "forward" not in vars(model)


def test_nothing_is_printed(model, optimizer, capfd):
    run(model, optimizer, batches(), num_iter=5)
    assert capfd.readouterr() == ("", "")


def test_under_bf16_the_loss_keeps_the_precision_that_it_has_in_training(model, optimizer):
    first = run(model, optimizer, batches(), num_iter=2, precision="bf16").losses[0]
    assert first != torch.tensor(first).bfloat16().item()


def test_it_starts_at_the_optimizers_learning_rate_and_really_trains(model, optimizer):
    curve = run(model, optimizer, batches(), num_iter=20)
    assert curve.lrs[0] == 1e-3
    assert len(set(curve.losses)) == 20


def curve(losses):
    losses = np.array(losses, dtype=float)
    return RangeTest(np.arange(1, len(losses) + 1) / 100, losses)


def test_a_loader_is_taken_as_it_is_and_one_that_ends_early_is_said(model, optimizer):
    loader = list(batches(5))
    assert len(range_test(model, optimizer, loader, num_iter=5).losses) == 5
    with pytest.raises(ValueError, match="after 5 of num_iter=6 iterations"):
        range_test(model, optimizer, loader, num_iter=6)


def test_min_loss_is_where_the_loss_is_lowest():
    assert suggest(curve([3, 2, 1, 2, 5]), "min_loss") == 0.03


def test_steepest_is_where_the_loss_falls_fastest():
    assert suggest(curve([10, 9.5, 9, 6, 3, 2.5, 2.4]), "steepest") == 0.04


def test_steepest_leaves_out_the_first_ten_and_last_five_points():
    falling_at_once = [100, 50, *np.linspace(10, 8, 20), 5, 3, 1, *np.linspace(1, 2, 10), 9, -50, -90]
    assert suggest(curve(falling_at_once), "steepest") == 0.23


def test_valley_is_half_way_down_the_longest_fall():
    # fastai's valley: half a third behind the first third of the longest decreasing run, here from the second loss on.
    losses = [5, 6, *np.linspace(5.5, 1, 18), 4, 8]
    chosen = round(suggest(curve(losses), "valley") * 100) - 1
    assert chosen == 9


@pytest.mark.parametrize("select", ["min_loss", "steepest", "valley"])
def test_losses_that_are_no_numbers_are_left_out(select):
    finite = [5, 4.5, 4, 3, 1, 0.9, 3, 7]
    assert suggest(curve([*finite, float("nan"), float("inf")]), select) == suggest(curve(finite), select)


@pytest.mark.parametrize("losses", [[float("nan")] * 5, [1.0, float("nan"), float("nan")]])
def test_a_curve_without_losses_is_an_error_that_says_what_to_do(losses):
    with pytest.raises(DivergedError, match="no finite loss") as error:
        suggest(curve(losses), "min_loss")
    assert "scheduler.max_lr=0.01" in str(error.value)


def test_a_range_test_that_meets_nan_chooses_from_what_came_before(model, optimizer):
    found = run(model, optimizer, batches(nan_from=30), num_iter=60)
    assert suggest(found, "min_loss") <= found.lrs[29]
    with pytest.raises(DivergedError):
        suggest(run(model, optimizer, batches(nan_from=0), num_iter=10), "min_loss")
