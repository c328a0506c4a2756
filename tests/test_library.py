"""The package as a library: lazy, free of the command line's dependencies, and the README's lines do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from readme import code_block

import resnet_cifar

ROOT = Path(__file__).parent.parent
# What a reader's own model is trained without.
WITHOUT_COMMAND_LINE = "import sys\nfor name in ('hydra', 'omegaconf', 'mlflow'): sys.modules[name] = None\n"


def python(code, folder):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", resnet_cifar.__all__)
def test_every_exported_name_is_there(name):
    assert getattr(resnet_cifar, name).__name__.removeprefix("resnet_cifar.") == name
    assert name in dir(resnet_cifar)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No resnet_cifar attribute CustomResnet"):
        resnet_cifar.CustomResnet  # noqa: B018


def test_importing_the_package_imports_nothing_else(tmp_path):
    imported = python("import sys, resnet_cifar; print({'torch', 'numpy', 'hydra'} & set(sys.modules))", tmp_path)
    assert (imported.stdout, imported.stderr) == ("set()\n", "")


def test_type_checkers_find_no_fault_with_the_package_and_the_readmes_lines(tmp_path):
    (tmp_path / "readers.py").write_text(
        f"{code_block('As a library')}\nfrom torchvision.datasets import CIFAR10\n"
        "reveal_type(as_images(CIFAR10('data')).to('cuda'))\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", "resnet_cifar", tmp_path / "readers.py"]
    checked = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert 'Revealed type is "resnet_cifar.data.Images"' in checked.stdout
    assert checked.returncode == 0, checked.stdout


def test_the_readmes_lines_train_evaluate_and_explain_a_model(tmp_path):
    done = python(WITHOUT_COMMAND_LINE + code_block("As a library"), tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert float(last.rpartition(" ")[2].rstrip("%")) > 80
    figures = {path.name for path in (tmp_path / "my_model" / "figures").iterdir()}
    assert figures == {"misclassified_images.png", "grad_cam_correct_conv.png", "grad_cam_predicted_conv.png"}


def test_the_range_test_needs_plain_arguments_only():
    train = resnet_cifar.as_images(resnet_cifar.Digits(train=True))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    augment = resnet_cifar.Augmentation([], resnet_cifar.Normalise([0.3] * 3, [0.3] * 3))
    batches = resnet_cifar.training_batches(train, augment, batch_size=64, seed=0, epoch=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    curve = resnet_cifar.range_test(model, optimizer, batches, num_iter=20)
    assert 1e-5 < resnet_cifar.suggest(curve) <= 0.1


def test_a_training_without_a_schedule_keeps_its_learning_rate():
    train = resnet_cifar.as_images(resnet_cifar.Digits(train=False))[:64]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    augment = resnet_cifar.Augmentation([], resnet_cifar.Normalise([0.3] * 3, [0.3] * 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    training = resnet_cifar.Training(model, optimizer, augment, epochs=2, batch_size=32)
    records = list(resnet_cifar.fit(training, train, train))
    assert [record.lr for record in records] == 6 * [0.25]


def test_mistakes_on_grey_images_are_explained_too(tmp_path):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8)
    images, normalise = (
        resnet_cifar.Images(pixels, torch.arange(8) % 2, ("a", "b")),
        resnet_cifar.Normalise([0.5], [0.5]),
    )
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), pool)
    logits = resnet_cifar.evaluate(model, images, normalise).logits
    resnet_cifar.explain_mistakes(tmp_path, model, images, logits, normalise, layers={"conv": "0"})
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"misclassified_images.png", "grad_cam_correct_conv.png", "grad_cam_predicted_conv.png"}
