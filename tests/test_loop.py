"""The loop: the reference's schedule to the last digit, the same numbers for the same seed, exact resumption, clean stops."""

import ast
import copy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_cifar import compose, data, loop, parts
from resnet_cifar.augment import Augmentation, Cutout, Normalise, RandomCrop
from resnet_cifar.custom_resnet import CustomResNet
from resnet_cifar.errors import DivergedError
from resnet_cifar.loop import EpochRecord, Progress, StepRecord, Training, evaluate, fit, train_epoch
from resnet_cifar.training import MovingAverage, build_training

PACKAGE = Path(loop.__file__).parent
# ../shared/reference/session_10_assignment.md: the LRs after each epoch's 98 batches, the last one extrapolated.
REFERENCE_LRS = [
    *(0.0028198179694770573, 0.0055043311614961345, 0.00818884435351521, 0.010873357545534288),
    *(0.013523211835648754, 0.01281115264101594, 0.012099093446383123, 0.011387034251750309),
    *(0.010674975057117493, 0.009962915862484677, 0.009250856667851862, 0.008538797473219048),
    *(0.007826738278586232, 0.007114679083953418, 0.006402619889320602, 0.005690560694687787),
    *(0.004978501500054971, 0.004266442305422157, 0.0035543831107893425, 0.0028423239161565264),
    *(0.002130264721523712, 0.001418205526890896, 0.0007061463322580817, -5.912862374732666e-06),
]
EPOCHS, STEPS = 24, 98
CLASSES = tuple("abcdefghij")


def reference_schedule(model):
    """Optimizer and schedule as the default configuration builds them, with the reference's max_lr."""
    arguments = compose.parse_arguments(["scheduler.max_lr=0.013530477745798068"])
    [(cfg, _)] = compose.compose(arguments).jobs
    optimizer = parts.build_optimizer(cfg.optimizer, cfg.param_groups, model)
    return optimizer, parts.build_scheduler(cfg.scheduler, optimizer, EPOCHS * STEPS), cfg


def synthetic(count, size=8, classes=4, seed=0):
    """Images whose class shows in their brightness: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randint(0, 100, (count, 3, size, size), generator=generator)
    return data.Images((noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, tuple(map(str, range(classes))))


def normalise():
    return Normalise([0.4] * 3, [0.2] * 3, channels_last=False)


def training(model=None, epochs=2, batch_size=16, seed=0, lr=0.01, images=40, precision="fp32"):
    if model is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2))
        model.append(nn.Linear(4 * 36, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    total = epochs * -(-images // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total)
    augment = Augmentation([RandomCrop(8, 1), Cutout(2, [0.4] * 3)], normalise())
    return Training(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        augment=augment,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        precision=precision,
    )


def run(parts_, train=None, held_out=None, progress=None):
    return list(fit(parts_, train or synthetic(40), held_out or synthetic(20, seed=1), progress or Progress()))


def numbers(records):
    return [
        (r.epoch, r.step, r.lr, r.loss.item())
        if isinstance(r, StepRecord)
        else (r.epoch, r.lr, r.train_loss, r.train_accuracy, r.eval_loss, r.eval_accuracy)
        for r in records
    ]


# The schedule


def test_the_configured_schedule_gives_the_references_24_learning_rates_to_the_last_digit():
    optimizer, scheduler, cfg = reference_schedule(nn.Linear(1, 1))
    lrs = []
    assert cfg.trainer.epochs == EPOCHS
    for _ in range(EPOCHS):
        for _ in range(STEPS):
            optimizer.step()
            scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == REFERENCE_LRS


def test_24_epochs_of_98_steps_use_the_schedule_and_never_a_learning_rate_below_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    optimizer, scheduler, _ = reference_schedule(model)
    images = synthetic(STEPS * 2 - 1, size=1)
    reference = training(model, epochs=EPOCHS, batch_size=2)
    reference.optimizer, reference.scheduler, reference.augment = optimizer, scheduler, Augmentation([], normalise())
    records = run(reference, images, synthetic(4, size=1))
    steps = [record for record in records if isinstance(record, StepRecord)]
    epochs = [record for record in records if isinstance(record, EpochRecord)]
    assert [record.step for record in steps] == list(range(1, EPOCHS * STEPS + 1))
    assert min(record.lr for record in records) > 0
    # The LR of an epoch's first step is the one after the last step of the epoch before.
    assert [steps[epoch * STEPS].lr for epoch in range(1, EPOCHS)] == REFERENCE_LRS[:-1]
    assert max(record.lr for record in steps) == pytest.approx(0.013530477745798068, rel=1e-3)
    assert [record.lr for record in epochs] == [steps[(epoch + 1) * STEPS - 1].lr for epoch in range(EPOCHS)]


# Numbers


def test_the_golden_loss_curve():
    """Of the real network at width 0.125 on digits, fp32, CPU; 2%: two threads instead of one already make 0.2%."""
    digits = data.as_images(data.Digits(train=True))
    torch.manual_seed(0)
    model = CustomResNet(num_classes=10, width=0.125)
    golden = training(model, batch_size=64, lr=0.002, images=256)
    golden.augment = Augmentation([RandomCrop(32, 4), Cutout(8, [0.3] * 3)], normalise())
    records = run(golden, digits[:256], digits[256:320])
    losses = [record.loss.item() for record in records if isinstance(record, StepRecord)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(GOLDEN), rtol=0.02, atol=0)


GOLDEN = [5.1923, 5.2781, 4.1196, 3.4971, 2.8293, 2.7040, 2.3128, 2.5430]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    first, second, other = (numbers(run(training(seed=seed))) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_seed_0_is_a_seed():
    losses = []
    for global_seed in (1, 2):
        torch.manual_seed(0)
        parts_ = training(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)), seed=0)
        torch.manual_seed(global_seed)  # from which the order and augmentation of the images do not come
        losses.append(numbers(list(fit(parts_, synthetic(40), synthetic(20, seed=1)))))
    assert losses[0] == losses[1]


def test_losses_are_means_per_image_with_a_smaller_last_batch_too():
    images = synthetic(40)
    reference = training(lr=1e-30, epochs=1)  # the weights stay, so the epoch's loss can be computed again
    reference.augment = Augmentation([], normalise())
    reference.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    [*_, epoch] = run(reference, images, images)
    logits = reference.model(normalise()(images.images))
    expected = nn.functional.cross_entropy(logits, images.labels).item()
    assert epoch.train_loss == pytest.approx(expected, rel=1e-5)
    assert epoch.eval_loss == pytest.approx(expected, rel=1e-5)
    assert epoch.train_accuracy == epoch.eval_accuracy == 100 * (logits.argmax(1) == images.labels).sum().item() / 40


def test_it_learns():
    first, last = (run(training(epochs=epochs, lr=0.03))[-1] for epochs in (1, 12))
    assert last.train_loss < first.train_loss / 2 and last.train_accuracy > 75 and last.eval_accuracy > 50


def test_evaluation_leaves_the_mode_and_the_statistics_as_they_were():
    model = training().model
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        model.train(mode)
        evaluation = evaluate(model, synthetic(20), normalise(), batch_size=8, precision="fp32")
        assert model.training is mode
    assert evaluation.logits.shape == (20, 4) and evaluation.logits.dtype == torch.float32
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_bf16_is_autocast_and_the_weights_stay_fp32():
    reference = training(precision="bf16", epochs=1)
    half, full = numbers(run(reference)), numbers(run(training(epochs=1)))
    assert half != full
    assert half[-1][2] == pytest.approx(full[-1][2], rel=0.05)
    assert {weights.dtype for weights in reference.model.parameters()} == {torch.float32}


# Ingredients


def averaging(decay):
    parts_ = training(epochs=1)
    parts_.averaged = MovingAverage(parts_.model, decay)
    return parts_


def test_the_average_is_torchs_bit_for_bit():
    model = training().model
    own = MovingAverage(model, 0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(3):
        with torch.no_grad():
            model(normalise()(synthetic(20, seed=seed).images))  # batch norm's statistics and counter
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        own.update_parameters(model)
        reference.update_parameters(model)
    assert own.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in reference.state_dict().items())


def test_the_average_follows_the_weights_step_by_step_and_is_what_is_evaluated():
    parts_, expected = averaging(0.75), None
    for record in fit(parts_, synthetic(40), synthetic(20, seed=1)):
        if isinstance(record, StepRecord):
            weights = parts_.model[-1].weight.detach()
            expected = weights.clone() if expected is None else 0.75 * expected + 0.25 * weights
    torch.testing.assert_close(parts_.averaged.module[-1].weight.detach(), expected)
    of_average = evaluate(parts_.averaged, synthetic(20, seed=1), normalise())
    assert record.eval_loss == of_average.loss != evaluate(parts_.model, synthetic(20, seed=1), normalise()).loss


def test_the_averages_statistics_are_averages_too():
    parts_ = averaging(0.75)
    run(parts_)
    own, averaged = (model[1].running_mean for model in (parts_.model, parts_.averaged.module))
    assert not torch.equal(own, averaged) and averaged.abs().sum() > 0


def test_label_smoothing_is_in_the_training_loss_and_not_in_the_evaluation():
    plain, smooth = training(epochs=1, lr=1e-9), training(epochs=1, lr=1e-9)
    smooth.label_smoothing = 0.2
    (first, *_, last), (plain_first, *_, plain_last) = run(smooth), run(plain)
    assert first.loss != plain_first.loss
    assert last.eval_loss == pytest.approx(plain_last.eval_loss, rel=1e-5)


def test_flip_averages_the_logits_of_both_views():
    model, images = training().model.eval(), synthetic(20)
    views = [evaluate(model, data.Images(pixels, *rest), normalise()) for pixels, *rest in both_views(images)]
    both = evaluate(model, images, normalise(), flip=True)
    torch.testing.assert_close(both.logits, (views[0].logits + views[1].logits) / 2)


def both_views(images):
    return [(pixels, images.labels, images.classes) for pixels in (images.images, images.images.flip(-1))]


# Stopping and going on


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_going_on_from_the_middle_is_bit_for_bit_the_same(stop_after):
    whole = training()
    expected = numbers(run(whole))
    interrupted, progress = training(), Progress()
    records = fit(interrupted, synthetic(40), synthetic(20, seed=1), progress)
    first = [next(records) for _ in range(stop_after)]
    kept = [part.state_dict() for part in (interrupted.model, interrupted.optimizer, interrupted.scheduler)]
    kept, progress = copy.deepcopy((kept, asdict(progress)))
    resumed = training()
    for part, state in zip((resumed.model, resumed.optimizer, resumed.scheduler), kept, strict=True):
        part.load_state_dict(state)
    torch.manual_seed(stop_after)  # dropout draws what the seed and the step say, whatever was drawn before
    rest = list(fit(resumed, synthetic(40), synthetic(20, seed=1), Progress(**progress)))
    assert numbers(first) + numbers(rest) == expected
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optimizer.state_dict(), whole.optimizer.state_dict(), rtol=0, atol=0)


def test_an_epochs_seconds_are_also_those_before_an_interruption():
    progress = Progress()
    records = fit(training(), synthetic(40), synthetic(20, seed=1), progress)
    next(records)
    assert progress.seconds > 0
    first, second = [r for r in run(training(), progress=Progress(seconds=100.0)) if isinstance(r, EpochRecord)]
    assert first.epoch_seconds > 100 > second.epoch_seconds
    assert first.images_per_second < 40 / 100


class BreaksAt(nn.Module):
    """A network whose logits are not finite from the given call on."""

    def __init__(self, call, value):
        super().__init__()
        self.linear, self.call, self.value, self.calls = nn.Linear(192, 4), call, value, 0

    def forward(self, images):
        self.calls += 1
        logits = self.linear(images.flatten(1))
        return logits * self.value if self.calls >= self.call else logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(value):
    model = BreaksAt(3, value)
    reference = training(model)
    records = fit(reference, synthetic(40), synthetic(20), Progress())
    next(records), next(records)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match=r"epoch 1, step 3, at LR 0\.0\d+") as error:
        next(records)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert "Lower scheduler.max_lr" in str(error.value) and error.value.exit_code == 6


def test_weights_that_break_in_an_epochs_last_step_are_no_epoch():
    with pytest.raises(DivergedError, match="epoch 1, step 3"):
        run(training(BreaksAt(4, float("nan"))))  # three steps, then the evaluation


# On a GPU, which is pretended


class PretendedGpu(FakeTensorMode):
    """What it computes is unknown: reading a number from it raises, as does mixing devices."""

    def __deepcopy__(self, memo):  # a network's copy is on the same one
        return self


class Copies(TorchDispatchMode):
    """Counts those between CPU and GPU, each of which waits until all that was asked for before is done."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.count += len({tensor.device for tensor in (*args, result) if isinstance(tensor, torch.Tensor)}) > 1
        return result


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:Accessing the data pointer")
@pytest.mark.parametrize("preset", ["session_10", "record", "laptop"])
def test_an_epoch_on_a_gpu_waits_for_nothing(preset, monkeypatch):
    monkeypatch.setattr(data, "seeded", lambda *key, device="cpu": torch.Generator())
    overrides = [f"experiment={preset}", "scheduler.max_lr=0.1", "data.batch_size=16", "model.width=0.125"]
    [(cfg, _)] = compose.compose(compose.parse_arguments(overrides)).jobs

    def backward(loss):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    with PretendedGpu():
        images = torch.zeros(40, 32, 32, 3, dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
        train = data.Images(images, torch.zeros(40, dtype=torch.long, device="cuda"), CLASSES)
        with torch.device("cuda"):
            network = parts.instantiate(cfg.model, num_classes=len(CLASSES))
        augment = parts.build_augmentation(cfg.augmentation, cfg.data, cfg.trainer.channels_last)
        built = parts.Parts(torch.device("cuda"), "bf16", network, augment, CLASSES)
        pretended = build_training(cfg, built, train, 0.1)
        monkeypatch.setattr(torch.Tensor, "backward", backward)  # torch's engine wants a real GPU
        for _warm_up in train_epoch(pretended, train, Progress(epoch=cfg.trainer.epochs)):
            pass
        with Copies() as copies:
            steps = list(train_epoch(pretended, train, Progress(epoch=cfg.trainer.epochs)))
    assert len(steps) == 3
    assert copies.count == 1  # the order of the images


# Who may import whom


def imported_by(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def imports(path):
    """The modules a file imports anywhere, those for type checkers aside."""

    class Without(ast.NodeTransformer):
        def visit_If(self, node):
            return None if getattr(node.test, "id", "") == "TYPE_CHECKING" else self.generic_visit(node)

    for node in ast.walk(Without().visit(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_loop_knows_no_tracker_and_no_plot():
    imported = imported_by("resnet_cifar.loop")
    ours = {name for name in imported if name.startswith("resnet_cifar.")}
    assert ours == {f"resnet_cifar.{name}" for name in ("loop", "augment", "data", "distributed", "errors")}
    assert not {"mlflow", "matplotlib", "hydra", "omegaconf"} & imported


def test_only_tracking_imports_mlflow():
    users = {path.name for path in PACKAGE.glob("*.py") if any(name.startswith("mlflow") for name in imports(path))}
    assert users == {"tracking.py"}


def test_pyplot_is_never_imported():
    assert not [path.name for path in PACKAGE.glob("*.py") if "import pyplot" in path.read_text()]
    assert not [path.name for path in PACKAGE.glob("*.py") if "matplotlib.pyplot" in list(imports(path))]


def test_the_package_never_imports_the_lab_book():
    for path in PACKAGE.glob("*.py"):
        assert not [name for name in imports(path) if name.partition(".")[0] == "experiments"], path.name
