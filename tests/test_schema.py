"""What may stand in a configuration, and what a refusal says."""

import pytest

from resnet_cifar import schema
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.errors import ConfigError


def problem(*overrides):
    """Why these overrides are refused; empty where they are not."""
    try:
        schema.check_jobs(compose(parse_arguments(overrides)).jobs)
    except ConfigError as error:
        return str(error)
    return ""


def refusal(*overrides):
    message = problem(*overrides)
    assert 1 <= len(message.splitlines()) <= 3, message
    return message


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "seed=4294967295",
        "trainer.device=cuda:1",
        "trainer.device=mps",
        "scheduler.max_lr=1",
        "scheduler.max_lr=0.02",
        "optimizer.weight_decay=0",
        "data.val_size=5000",
        "data.train_size=512",
        "tracking=none",
        "tracking.uri=http://localhost:5000",
        "tracking.uri=postgresql+psycopg2://user@host/db",
        "tracking.run_name='peak 0.02, seed 1'",
        "+optimizer.betas=[0.9,0.95]",
        "scheduler=constant",
    ],
)
def test_valid_values_pass(override):
    assert problem(override) == ""


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.lr=abc", "optimizer.lr=abc should be a valid number"),
        ("optimizer.lr=true", "optimizer.lr=true should be a valid number"),
        ("optimizer.lr=0", "optimizer.lr=0 should be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan should be a finite number"),
        ("optimizer.lr=null", "optimizer.lr=null should be a valid number"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1"),
        ("+optimizer.eps=inf", "optimizer.eps=inf should be a finite number"),
        ("scheduler.max_lr=[0.01,0.02]", "scheduler.max_lr=[0.01, 0.02] should be 'find' or be a valid number"),
        ("+optimizer.betas=[0.9,1]", "optimizer.betas.1=1 should be less than 1"),
        ("seed=true", "seed=true should be a valid integer"),
        ("seed=1e3", "seed=1000.0 should be a valid integer"),
        ("seed=-1", "seed=-1"),
        ("seed=", "seed= should be a valid integer"),
        ("seed=null", "seed=null"),
        ("~seed", "seed is required"),
        ("~scheduler", "scheduler is required"),
        ("~scheduler.three_phase", "scheduler.three_phase is required"),
        ("trainer.epochs=1.5", "trainer.epochs=1.5 should be a valid integer"),
        ("trainer.epochs=0", "trainer.epochs=0"),
        ("explain.num_images=201", "explain.num_images=201"),
        ("trainer.device=gpu", "auto, cpu, mps, cuda or cuda:N"),
        ("trainer.precision=fp16", "'auto', 'fp32' or 'bf16'"),
        ("trainer.compile=1", "trainer.compile=1"),
        ("+trainer.epoch=3", "trainer.epoch is not a key; did you mean trainer.epochs?"),
        ("task=test", "'train', 'find_lr', 'evaluate', 'explain' or 'sync'"),
        ("model.width=0", "model.width=0 should be greater than 0"),
        ("data.batch_size=0", "data.batch_size=0"),
        ("data.mean=[0.5,0.5]", "data.mean=[0.5, 0.5]"),
        ("data.std=[0.2,0.2,0]", "data.std.2=0 should be greater than 0"),
        ("scheduler.max_lr=fnd", "scheduler.max_lr=fnd should be 'find' or be a valid number"),
        ("scheduler.max_lr=inf", "scheduler.max_lr=inf"),
        ("scheduler.pct_start=1", "scheduler.pct_start=1"),
        ("scheduler.pct_start=0", "scheduler.pct_start=0"),
        ("scheduler.div_factor=0", "scheduler.div_factor=0"),
        ("scheduler.anneal_strategy=exp", "'cos' or 'linear'"),
        ("lr_finder.num_iter=1", "lr_finder.num_iter=1"),
        ("augmentation.transforms.0.padding=-1", "augmentation.transforms.0.padding=-1"),
        ("tracking.run_name=../other", "without '/'"),
        ("tracking.run_name=..", "without '/'"),
        ("explain.num_images=0", "explain.num_images=0"),
        ("model._target_=os.system", "model._target_=os.system should be a class in resnet_cifar"),
        ("optimizer._target_=torch.load", "optimizer._target_=torch.load"),
        ("+model.norm={_target_: builtins.open}", "model.norm._target_=builtins.open"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(override, part):
    assert part in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("task=evaluate", "task=evaluate needs checkpoint"),
        ("task=explain", "task=explain needs checkpoint"),
        ("checkpoint=run", "would do nothing with task=train"),
        ("explain.images=folder", "would do nothing with task=train"),
        ("data.root=null", "data.root is empty"),
        ("data.train_size=100", "data.batch_size=512 should be at most data.train_size=100"),
        ("scheduler.three_phase=true scheduler.pct_start=0.6", "scheduler.pct_start=0.6 should be at most 0.5"),
        ("experiment=record data=digits", "AlternatingFlip makes other signs of digits: give augmentation=crop_cutout"),
        ("experiment=record data=digits augmentation=crop_cutout", "flip_tta makes other signs of digits"),
        (
            "augmentation=small_first augmentation.transforms.2.first=18",
            "transforms.2.first=18 should be a multiple of 4",
        ),
        ("lr_finder.end_lr=0.001", "lr_finder.end_lr=0.001 should be above optimizer.lr=0.001"),
        ("param_groups.norm_bias_lr_factor=64", "give scheduler.max_lr as a number"),
        ("scheduler.max_lr=0.1 optimizer.lr=0.01", "optimizer.lr=0.01 would do nothing"),
        ("optimizer=sgd optimizer.momentum=0.5", "optimizer.momentum=0.5 would do nothing"),
        ("-m scheduler.max_lr=0.02,0.01 optimizer.lr=0.001", "optimizer.lr=0.001 would do nothing"),
        ("+optimizer.betas=[0.5,0.999]", "the first of optimizer.betas, 0.5, would do nothing"),
        ("tracking.uri=postgres://host/db", "postgresql://"),
        ("tracking.uri=mlruns", "tracking.uri=mlruns should be a database or a server"),
        ("tracking.uri=sqlite://a.db", "three slashes"),
        ("tracking.uri='sqlite:///:memory:'", "ends with the process"),
        (
            "experiment=laptop_94 trainer.epochs=10",
            "augmentation.transforms.2.epochs=14 should be at most trainer.epochs=10",
        ),
        ("trainer.devices=2 task=find_lr", "trainer.devices=2 would do nothing with task=find_lr"),
        ("trainer.devices=2 data.batch_size=1", "trainer.devices=2 should be at most data.batch_size=1"),
        ("trainer.devices=2 trainer.device=cuda:1", "trainer.device=cuda:1 names one GPU"),
        ("tracking.experiment=null", "tracking.experiment is empty"),
        ("tracking.artifacts=null", "tracking.artifacts is empty"),
    ],
)
def test_values_that_cannot_go_together_are_refused(overrides, part):
    assert part in refusal(*overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "task=evaluate checkpoint=run",
        "trainer.devices=2",
        "experiment=laptop_94 trainer.epochs=10 augmentation.transforms.2.epochs=8",
        "task=evaluate checkpoint=run data.train_size=100",
        "data.train_size=600 data.val_size=5000",
        "experiment=record data=digits augmentation=crop_cutout trainer.flip_tta=false",
        "+optimizer.betas=[0.9,0.99]",
        "+optimizer.betas=[0.5,0.999] scheduler.cycle_momentum=false",
        "scheduler.three_phase=true scheduler.pct_start=0.5",
        "task=explain checkpoint=run explain.images=folder",
        "-m scheduler.max_lr=find,0.1 lr_finder.end_lr=1",
        "-m scheduler.max_lr=find,0.01 optimizer.lr=0.0001",
        "-m experiment=laptop,session_10 optimizer.lr=0.001",
        "-m scheduler=one_cycle,cosine optimizer=sgd optimizer.momentum=0.8",
        "-m scheduler=one_cycle,cosine +optimizer.betas=[0.8,0.95]",
        "-m hydra.sweeper._target_=mine.Sweeper experiment=laptop scheduler.max_lr=find,0.1 lr_finder.end_lr=1",
        "tracking=none tracking.experiment=mine",
        "scheduler=constant optimizer.lr=0.2",
        "optimizer=sgd optimizer.momentum=0.5 scheduler.cycle_momentum=false",
        "optimizer=sgd optimizer.momentum=0.5 scheduler=cosine",
        "task=find_lr scheduler.max_lr=0.1 optimizer.lr=0.01",
        "data=digits data.root=null",
        "data.batch_size=8 data.train_size=8",
    ],
)
def test_the_same_values_pass_where_they_mean_something(overrides):
    assert problem(*overrides.split()) == ""


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:s3cr3t@host/db",
        "https://me:s3cr3t@host",
        "https://s3cr3t@host",
        "'postgresql://me:p/s3cr3t@host/db'",
        "'postgresql://host/db?password=s3cr3t'",
    ],
)
def test_a_password_is_refused_without_being_repeated(uri):
    message = refusal(f"tracking.uri={uri}", "seed=x")
    assert "tracking.uri holds a password" in message
    assert "s3cr3t" not in message


def test_a_password_out_of_the_environment_is_refused_too(monkeypatch):
    monkeypatch.setenv("DATABASE", "mysql://me:s3cr3t@host/db")
    assert "s3cr3t" not in refusal("tracking.uri=${oc.env:DATABASE}")


def test_a_missing_environment_variable_is_named_with_its_key():
    message = refusal("output_dir=${oc.env:NOT_SET_ANYWHERE}")
    assert "output_dir" in message
    assert "NOT_SET_ANYWHERE" in message


@pytest.mark.parametrize("value", ["${nowhere}", "${no_resolver:1}", "${seed}"])
def test_a_broken_interpolation_is_refused_with_its_key(value):
    assert "seed" in refusal(f"seed={value}")


def test_many_wrong_values_are_still_three_lines():
    message = refusal("seed=x", "trainer.epochs=x", "data.batch_size=x", "model.width=x", "task=x")
    assert message.endswith("and 3 more")
