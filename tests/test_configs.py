"""Every YAML in conf/ composes, passes the schema and names targets that take the arguments beside them."""

import pytest
from omegaconf import OmegaConf
from readme import code_blocks

from resnet_cifar import parts, schema
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.hydra_setup import CONF
from resnet_cifar.suggestions import keys

GROUPS = sorted(path for path in CONF.rglob("*.yaml") if path.parent not in (CONF, *CONF.glob("hydra/*")))


def composed(*overrides):
    [(cfg, _)] = compose(parse_arguments(overrides)).jobs
    return cfg


@pytest.mark.parametrize("option", [f"{path.parent.name}={path.stem}" for path in GROUPS])
def test_every_option_of_every_group_composes_and_its_targets_take_its_arguments(option):
    cfg = composed(option)
    schema.check_jobs([(cfg, [option])])
    parts.check_targets(cfg)


def test_the_readmes_preset_model_and_data_set_are_taken_from_a_folder_of_ones_own(tmp_path):
    for group, text in zip(("experiment", "model", "data"), code_blocks("Adding something", "yaml"), strict=True):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    given = ["experiment=mine", "model=mine", "data=mine"]
    [(cfg, _)] = compose(parse_arguments(["--config-dir", str(tmp_path), *given])).jobs
    schema.check_jobs([(cfg, given)])
    parts.check_targets(cfg)
    network = parts.build_parts(cfg, tuple(map(str, range(100)))).network
    assert (type(network).__name__, network.fc.out_features) == ("ResNet", 100)
    assert cfg.data.dataset._target_.endswith("CIFAR100") and list(cfg.explain.layers) == ["last"]
    assert (cfg.optimizer._target_, cfg.scheduler.max_lr) == ("torch.optim.SGD", 0.4)


def test_session_10_is_the_defaults():
    assert composed("experiment=session_10") == composed()


def test_the_defaults_are_the_assignment():
    cfg = OmegaConf.to_container(composed(), resolve=True)
    assert cfg["optimizer"] == {"_target_": "torch.optim.Adam", "lr": 1e-3, "weight_decay": 1e-7}
    assert cfg["scheduler"] == {
        "_target_": "torch.optim.lr_scheduler.OneCycleLR",
        "max_lr": "find",
        "pct_start": 5 / 24,
        "div_factor": 100,
        "final_div_factor": 100,
        "anneal_strategy": "linear",
        "three_phase": False,
        "cycle_momentum": True,
    }
    assert (cfg["trainer"]["epochs"], cfg["data"]["batch_size"], cfg["model"]["width"]) == (24, 512, 1.0)
    finder = {"end_lr": 0.1, "num_iter": 100, "step_mode": "exp", "select": "min_loss"}
    assert cfg["lr_finder"] == finder


def test_digits_are_never_flipped():
    transforms = composed("data=digits").augmentation.transforms
    assert not any("Flip" in transform._target_ for transform in transforms)


def test_the_augmentation_chosen_by_hand_wins_over_the_one_of_digits():
    assert composed("data=digits", "augmentation=none").augmentation.transforms == []


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_the_groups_chosen_by_hand_win_over_those_of_a_preset(preset):
    cfg = composed(f"experiment={preset}", "augmentation=none", "optimizer=adam", "data=digits")
    assert cfg.augmentation.transforms == []
    assert cfg.optimizer._target_ == "torch.optim.Adam"
    assert cfg.data.dataset._target_ == "resnet_cifar.data.Digits"


def test_a_preset_is_a_delta_whose_header_says_purpose_and_command():
    for path in (CONF / "experiment").glob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        delta = [line for line in lines if not line.startswith("#")]
        assert len(delta) <= 15, path
        assert f"python run.py experiment={path.stem}" in "\n".join(lines), path


def test_the_schema_knows_no_key_that_conf_does_not_have():
    configured = set(keys(OmegaConf.to_container(composed(), resolve=False)))
    for section, fields in schema.Config.__annotations__.items():
        closed = getattr(fields, "__pydantic_config__", {}).get("extra") == "forbid"
        assert section in configured
        for field in fields.__annotations__ if closed else ():
            assert f"{section}.{field}" in configured
