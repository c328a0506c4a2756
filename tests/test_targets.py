"""Which `_target_` may be called, and what building one says when it cannot."""

import pytest
import torch
from omegaconf import OmegaConf

from resnet_cifar.errors import ConfigError
from resnet_cifar.targets import check_arguments, instantiate, resolve


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("torch.optim.SGD", "SGD"),
        ("torch.optim.lr_scheduler.OneCycleLR", "OneCycleLR"),
        ("torch.nn.Identity", "Identity"),
        ("torchvision.datasets.CIFAR10", "CIFAR10"),
        ("torchvision.transforms.v2.ColorJitter", "ColorJitter"),
        ("torchvision.models.resnet18", "resnet18"),
        ("resnet_cifar.custom_resnet.CustomResNet", "CustomResNet"),
    ],
)
def test_classes_of_allowed_modules_are_resolved(path, name):
    assert resolve(path).__name__ == name


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.nn.init.normal_",
        "torch.nn.modules.module.OrderedDict",
        "torchvision.datasets.utils.download_url",
        "torchvision.models._api.load_state_dict_from_url",
        "torchvision.models.resnet.partial",
        "resnet_cifar.hydra_setup.Path",
        "resnet_cifar.hydra_setup.CONF",
        "resnet_cifar.provenance._run_git",
        "resnet_cifar.training_processes.launch",
        "resnet_cifar",
        "torch.optim.",
        ".torch.optim.SGD",
    ],
)
def test_other_targets_are_refused(path):
    with pytest.raises(ConfigError, match="is not allowed"):
        resolve(path)


@pytest.mark.parametrize(
    "path",
    [
        "torch.optim.Nothing",
        "resnet_cifar.nothing.Nothing",
        "torch.optim.optimizer.torch.load",  # there by attributes alone, which are not walked through
        "torch.optim.optimizer.torch.optim.SGD",
        "resnet_cifar.hydra_setup.os.system",
    ],
)
def test_a_target_that_cannot_be_imported_is_an_error(path):
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve(path)


def node(**values):
    return OmegaConf.create(values)


def test_an_optimizer_holds_the_very_parameters_it_was_given():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = instantiate(node(_target_="torch.optim.SGD", lr=0.5), params=parameters)
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_supplied_argument_wins_over_the_configured_one():
    linear = instantiate(node(_target_="torch.nn.Linear", in_features=2, out_features=3), out_features=4)
    assert linear.out_features == 4


def test_lists_arrive_as_plain_lists():
    jitter = instantiate(node(_target_="torchvision.transforms.v2.Pad", padding=[1, 2]))
    assert type(jitter.padding) is list


def test_nested_targets_are_built():
    sequential = instantiate(node(_target_="torch.nn.Sequential", _args_=[{"_target_": "torch.nn.ReLU"}]))
    assert isinstance(sequential[0], torch.nn.ReLU)


def test_a_nested_partial_stays_a_callable():
    model = instantiate(
        node(
            _target_="torchvision.models.resnet18",
            norm_layer={"_target_": "torch.nn.BatchNorm2d", "_partial_": True, "momentum": 0.5},
        )
    )
    assert model.bn1.momentum == 0.5


def test_a_nested_target_that_is_not_allowed_is_refused():
    with pytest.raises(ConfigError, match=r"os\.getcwd"):
        instantiate(node(_target_="torch.nn.Identity", inner={"_target_": "os.getcwd"}))


def test_an_unknown_argument_is_named_with_the_one_that_was_meant():
    with pytest.raises(
        ConfigError, match=r"SGD\(\) got an unexpected keyword argument 'momentm'; did you mean momentum"
    ):
        check_arguments(node(_target_="torch.optim.SGD", lr=0.1, momentm=0.9), "params")


def test_an_argument_that_keywords_hand_on_to_a_class_without_it_is_to_be_taken_out():
    model = OmegaConf.create({"model": {"_target_": "torchvision.models.resnet18", "width": 1.0}}).model
    with pytest.raises(ConfigError, match=r"take it out: ~model\.width"):
        instantiate(model, num_classes=10)


def test_a_missing_argument_is_named():
    with pytest.raises(ConfigError, match="max_lr"):
        check_arguments(node(_target_="torch.optim.lr_scheduler.OneCycleLR", total_steps=3), "optimizer")


def test_a_value_the_target_refuses_is_a_configuration_error():
    with pytest.raises(ConfigError, match="Nesterov momentum requires"):
        instantiate(node(_target_="torch.optim.SGD", lr=0.1, nesterov=True), params=[torch.zeros(1)])


def test_other_errors_of_a_target_pass_as_they_are(tmp_path):
    missing = node(_target_="torchvision.datasets.CIFAR10", root=str(tmp_path), download=False)
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        instantiate(missing)
