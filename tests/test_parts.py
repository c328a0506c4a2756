"""From the configuration to images, optimizer and schedule: read once, and parameters with settings of their own."""

import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from resnet_cifar import parts, schema
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.custom_resnet import CustomResNet
from resnet_cifar.data import Images
from resnet_cifar.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model():
    return CustomResNet(width=0.125)


def built(model, *overrides):
    [(cfg, _)] = compose(parse_arguments(["optimizer=sgd", "scheduler.max_lr=0.5", *overrides])).jobs
    optimizer = parts.build_optimizer(cfg.optimizer, cfg.param_groups, model)
    parts.check_rise(cfg.scheduler, total_steps=24)
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


def test_a_rise_of_one_step_is_refused(model):
    with pytest.raises(ConfigError, match=r"scheduler\.pct_start=0\.041.* of 24 steps is one step"):
        built(model, f"scheduler.pct_start={1 / 24}")


def test_a_schedule_of_three_phases_that_would_never_rise_is_refused(model):
    with pytest.raises(ConfigError, match="less than one, with which a schedule of three phases never rises"):
        built(model, "scheduler.three_phase=true", f"scheduler.pct_start={0.5 / 24}")


def test_a_factor_for_biases_that_are_not_there_is_refused():
    without_batch_norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    with pytest.raises(ConfigError, match="norm_bias_lr_factor would do nothing"):
        built(without_batch_norm, "param_groups.norm_bias_lr_factor=64")


@pytest.mark.parametrize(("steps_of_rise", "warned"), [(0.5, True), (1.5, False)])
def test_a_rise_of_less_than_a_step_is_said(model, caplog, steps_of_rise, warned):
    optimizer, _ = built(model, f"scheduler.pct_start={steps_of_rise / 24}", "scheduler.div_factor=10")
    starts_at_the_bottom = optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["max_lr"] / 10)
    assert starts_at_the_bottom != warned
    assert ("nothing rises" in caplog.text) == warned


def test_a_schedule_that_waits_for_a_metric_is_refused():
    given = ["scheduler=constant", "scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"]
    [(cfg, _)] = compose(parse_arguments(given)).jobs
    with pytest.raises(ConfigError, match="ReduceLROnPlateau waits for a metric"):
        parts.check_targets(cfg)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["++scheduler.total_steps=100"], "scheduler.total_steps=100: the schedule begins and ends with the training"),
        (["++scheduler.epochs=1", "++scheduler.steps_per_epoch=3"], "scheduler.epochs=1"),
        (["scheduler=cosine", "++scheduler.last_epoch=5"], "scheduler.last_epoch=5"),
        (
            ["scheduler=constant", "optimizer._target_=torch.optim.LBFGS", "~optimizer.weight_decay"],
            "LBFGS wants a closure",
        ),
        (["optimizer._target_=torch.optim.SparseAdam", "~optimizer.weight_decay"], "SparseAdam wants sparse gradients"),
    ],
)
def test_what_would_stop_in_the_middle_of_a_training_is_refused_before_it(given, part):
    [(cfg, _)] = compose(parse_arguments(["data=digits", *given])).jobs
    with pytest.raises(ConfigError, match=part):
        parts.check_targets(cfg)


def test_images_of_another_number_of_channels_are_refused(monkeypatch):
    [(cfg, _)] = compose(parse_arguments(["data=digits"])).jobs
    grey = Images(torch.zeros(20, 1, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.long), ("a",))
    monkeypatch.setattr(parts, "_read", lambda *_: (grey, None))
    with pytest.raises(DataError, match="have 1 channels; they should have 3"):
        parts.load_test(cfg.data)


def test_weight_decay_can_be_left_to_the_weights_alone(model):
    decays = settings(built(model, "param_groups.decay_norm_and_bias=false")[0], "weight_decay")
    weights = of_kind(model, nn.Conv2d, "weight") | of_kind(model, nn.Linear, "weight")
    assert {key for key, decay in decays.items() if decay == 5e-4} == weights
    assert set(decays.values()) == {0.0, 5e-4}


def test_a_split_is_made_once_for_all_the_jobs_of_a_sweep():
    [(cfg, _)] = compose(parse_arguments(["experiment=quickstart", "data.val_size=100"])).jobs
    first, second = (parts.load_train_and_val(cfg.data) for _ in range(2))
    assert [len(images) for images in first] == [1337, 100]
    for before, after in zip(first, second, strict=True):
        assert before.images.data_ptr() == after.images.data_ptr()


def test_files_that_are_there_are_verified_once(monkeypatch, cifar10):
    verified, check = [], torchvision.datasets.cifar.check_integrity

    def counted(path, md5):
        verified.append(Path(path).name)
        return check(path, md5)

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", counted)
    [(cfg, _)] = compose(parse_arguments([f"data.root={cifar10}", "data.test_size=10"])).jobs
    parts._read.cache_clear()
    assert len(parts.load_test(cfg.data)) == 10
    batches = {f"data_batch_{number}" for number in range(1, 6)} | {"test_batch"}
    assert {name for name in verified if "batch_" in name or "_batch" in name} >= batches
    assert len(verified) == len(set(verified))


def test_one_process_downloads_while_the_others_wait(monkeypatch, tmp_path, cifar10):
    happened = []

    def download(self):
        if self._check_integrity():
            return
        happened.append("begins")
        time.sleep(0.1)
        shutil.copytree(cifar10 / self.base_folder, Path(self.root, self.base_folder))
        happened.append("ends")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    [(cfg, _)] = compose(parse_arguments([f"data.root={tmp_path / 'data'}"])).jobs
    parts._read.cache_clear()
    with ThreadPoolExecutor() as threads:
        loaded = [threads.submit(parts.load_test, cfg.data) for _ in range(3)]
    assert [len(images.result()) for images in loaded] == 3 * [10_000]
    assert happened == ["begins", "ends"]


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ((), True),
        (("scheduler.cycle_momentum=false",), False),
        (("~scheduler.cycle_momentum",), True),  # torch's default
        (("scheduler=cosine",), False),
        (("task=find_lr",), False),
    ],
)
def test_an_optimizer_without_momentum_wants_a_schedule_that_does_not_cycle_it(given, refused):
    without = "optimizer={_target_: torch.optim.Rprop, lr: 0.01}"
    [(cfg, _)] = compose(parse_arguments(["data=digits", without, "~optimizer.weight_decay", *given])).jobs
    schema.check(cfg)
    with pytest.raises(ConfigError, match="give scheduler") if refused else nullcontext():
        parts.check_targets(cfg)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_tensor():
    code = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: with huge pages there are few to clear
from resnet_cifar import parts

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(100_000_000)  # glibc clears it page by page, and gives it back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert faults() > 20_000 and faults() > 20_000
parts.keep_freed_memory()
faults()
assert faults() < 1_000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [(["avx512_bf16"], "bf16"), (["amx_bf16"], "bf16"), (["avx512_f"], "fp32"), ([], "fp32")],
)
def test_auto_is_bf16_where_the_processor_has_some_instructions_for_it(monkeypatch, instructions, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    assert parts.choose_precision("auto", torch.device("cpu")) == precision


@pytest.mark.parametrize(("precision", "products"), [("bf16", "medium"), ("fp32", "highest")])
def test_products_outside_autocast_may_be_faster_under_bf16_alone(precision, products):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    [(cfg, _)] = compose(
        parse_arguments([f"trainer.precision={precision}", "trainer.device=cpu", "model.width=0.125"])
    ).jobs
    try:
        parts.build_parts(cfg, ("cat", "dog"))
        assert torch.get_float32_matmul_precision() == products
        assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
