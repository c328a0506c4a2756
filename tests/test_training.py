"""The rehearsal before a training: what would end it later ends it at once, and nothing else is touched."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from resnet_cifar import parts, training
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.data import Images
from resnet_cifar.errors import ConfigError, DataError

CLASSES = tuple("0123456789")


def images(number, size=32):
    return Images(torch.zeros(number, 3, size, size, dtype=torch.uint8), torch.zeros(number, dtype=torch.long), CLASSES)


def prepared(*overrides, network=None):
    given = ["data=digits", "data.batch_size=16", "model.width=0.125", "trainer.device=cpu", *overrides]
    [(cfg, _)] = compose(parse_arguments(given)).jobs
    built = parts.build_parts(cfg, CLASSES)
    return cfg, built if network is None else dataclasses.replace(built, network=network)


def rehearse(*overrides, train=40, network=None, size=32):
    training.rehearse(*prepared(*overrides, network=network), images(train, size), images(40, size))


def linear(outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, outputs))


def test_the_rehearsal_leaves_no_trace():
    cfg, built = prepared()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in built.network.state_dict().items()}
    with_dropout = dataclasses.replace(built, network=nn.Sequential(nn.Dropout(), built.network))
    training.rehearse(cfg, with_dropout, images(40), images(40))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in built.network.state_dict().items())
    assert built.network.training


@pytest.mark.parametrize(
    ("overrides", "network", "part"),
    [
        (["augmentation.transforms.0.size=24"], linear(10), "given 8 images of 24x24 pixels, fails"),
        ([], linear(12), "should return logits of \\(8, 10\\), a row for each: it returns \\(8, 12\\)"),
        ([], nn.Conv2d(5, 10, 3), "given 8 images of 32x32 pixels, fails: RuntimeError: Given groups=1"),
        (["++scheduler.base_momentum=[0.8,0.9]"], None, "base_momentum"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(overrides, network, part):
    with pytest.raises(ConfigError, match=part):
        rehearse(*overrides, network=network)


class GhostNorm(nn.Module):
    """Statistics over quarters of a batch, which two images do not have."""

    def forward(self, images):
        if self.training:
            images.view(4, -1, *images.shape[1:])
        images.requires_grad_().mul(1).register_hook(lambda gradient: gradient) if self.training else None
        return images


def test_a_network_that_divides_its_batches_is_tried_on_a_whole_one():
    rehearse(network=nn.Sequential(GhostNorm(), linear(10)))  # whose last batch has 8 images
    with pytest.raises(ConfigError, match="given 6 images"):
        rehearse(train=38, network=nn.Sequential(GhostNorm(), linear(10)))


def test_another_size_in_training_is_said(caplog):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    rehearse("augmentation.transforms.0.size=28", network=pooled)
    assert "Training ends on images of 28x28 pixels, and 32x32 are evaluated." in caplog.text


def test_images_too_small_for_a_transform_are_refused():
    with pytest.raises(ConfigError, match="Cutout: size=16 should be at most 8"):
        rehearse(
            "augmentation=crop_cutout", "augmentation.transforms.0.size=8", "augmentation.transforms.1.size=16", size=8
        )


def test_a_last_batch_of_one_image_is_refused_where_batch_norm_cannot_train_on_it():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 10))
    rehearse(train=34, network=pooled)
    with pytest.raises(ConfigError, match=r"given 1 image .*\nThe last batch has no more for a process"):
        rehearse(train=33, network=pooled)


def test_a_schedule_whose_state_no_checkpoint_could_be_read_back_with_is_refused(monkeypatch):
    state = torch.optim.lr_scheduler.OneCycleLR.state_dict
    monkeypatch.setattr(
        torch.optim.lr_scheduler.OneCycleLR, "state_dict", lambda self: {**state(self), "factor": np.float64(0.5)}
    )
    with pytest.raises(ConfigError, match="OneCycleLR has a state that no checkpoint could be read back with"):
        rehearse()


@pytest.mark.parametrize(("decay", "warned"), [(0.9, False), (0.97, False), (0.999, True)])
def test_an_average_that_hardly_leaves_the_first_weights_is_said(caplog, decay, warned):
    rehearse(f"trainer.ema_decay={decay}", "trainer.epochs=10")
    assert ("mostly of the first steps' weights" in caplog.text) == warned


@pytest.mark.parametrize(
    ("layers", "said"),
    [((nn.Conv2d(3, 3, 1),), True), ((nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), False), ((), False)],
    ids=["without", "with", "no convolution"],
)
def test_muon_without_a_normalisation_behind_the_convolutions_is_said(caplog, layers, said):
    rehearse("optimizer=muon", network=nn.Sequential(*layers, linear(10)))
    assert ("Muon rescales" in caplog.text) == said


class AddsInFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 10)

    def forward(self, images):
        logits = torch.zeros(len(images), 10)
        return logits.index_add_(0, torch.arange(len(images)), self.linear(images.flatten(1)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_is_tried_in_the_precision_of_the_training(precision):
    with nullcontext() if precision == "fp32" else pytest.raises(ConfigError, match="same scalar type"):
        rehearse(f"trainer.precision={precision}", network=AddsInFloat32())


def test_test_images_of_other_classes_are_refused(monkeypatch):
    cfg, _ = prepared()
    others = dataclasses.replace(images(40), classes=("cat", *CLASSES[1:]))
    monkeypatch.setattr(parts, "load_test", lambda _data: others)
    with pytest.raises(DataError, match="the test images have cat, 1, 2"):
        training.load(cfg)
