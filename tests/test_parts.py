"""From the configuration to optimizer and schedule: parameters with settings of their own."""

import pytest
from torch import nn

from resnet_cifar import parts
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.custom_resnet import CustomResNet


@pytest.fixture(scope="module")
def model():
    return CustomResNet(width=0.125)


def built(model, *overrides):
    [(cfg, _)] = compose(parse_arguments(["optimizer=sgd", "scheduler.max_lr=0.5", *overrides])).jobs
    optimizer = parts.build_optimizer(cfg.optimizer, cfg.param_groups, model)
    return optimizer, parts.build_scheduler(cfg.scheduler, optimizer, total_steps=24)


def settings(optimizer, key):
    return {id(parameter): group[key] for group in optimizer.param_groups for parameter in group["params"]}


def of_kind(model, kind, name):
    return {id(getattr(module, name)) for module in model.modules() if isinstance(module, kind)}


def test_by_default_all_parameters_are_one_group_in_the_models_order(model):
    [group] = built(model)[0].param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


def test_biases_of_batch_norm_have_their_own_learning_rate_through_the_whole_schedule(model):
    optimizer, scheduler = built(model, "param_groups.norm_bias_lr_factor=64")
    biases = of_kind(model, nn.BatchNorm2d, "bias")
    for _ in range(24):
        lrs = settings(optimizer, "lr")
        first = optimizer.param_groups[0]["lr"]
        assert lrs == pytest.approx({key: first * (64 if key in biases else 1) for key in lrs})
        optimizer.step()
        if scheduler.last_epoch < 23:
            scheduler.step()


def test_weight_decay_can_be_left_to_the_weights_alone(model):
    decays = settings(built(model, "param_groups.decay_norm_and_bias=false")[0], "weight_decay")
    weights = of_kind(model, nn.Conv2d, "weight") | of_kind(model, nn.Linear, "weight")
    assert {key for key, decay in decays.items() if decay == 5e-4} == weights
    assert set(decays.values()) == {0.0, 5e-4}
