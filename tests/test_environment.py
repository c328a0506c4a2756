"""Values from the environment are used and not written down; the same table says which test keeps which promise."""

import ast
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from resnet_cifar.environment import without_environment
from resnet_cifar.passwords import without_passwords

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("WORD", "sesame")


def test_whatever_depends_on_the_environment_stays_as_it_was_written():
    written = {"a": "${oc.env:WORD}", "b": {"c": "open ${a}", "d": [1, "${a}"]}, "whole": "${b.d}"}
    assert without_environment(OmegaConf.create(written)) == written


def test_everything_else_is_resolved():
    cfg = OmegaConf.create({"word": "${oc.env:WORD}", "n": 3, "m": "${n}", "list": ["${n}", None], "all": "${list}"})
    hidden = without_environment(cfg)
    assert hidden == {"word": "${oc.env:WORD}", "n": 3, "m": 3, "list": [3, None], "all": [3, None]}


def test_it_resolves_to_the_same_values_again():
    cfg = OmegaConf.create({"word": "${oc.env:WORD}", "number": "${oc.decode:${oc.env:N,7}}", "plain": "${number}"})
    again = OmegaConf.create(without_environment(cfg))
    assert OmegaConf.to_container(again, resolve=True) == {"word": "sesame", "number": 7, "plain": 7}


def test_a_value_that_is_a_secret_by_its_name_is_blotted_out_of_any_text(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    assert without_passwords("401 for hunter2hunter2 at host") == "401 for *** at host"


def test_what_stands_between_an_address_and_an_at_is_kept():
    line = "tracking.uri=sqlite:////tmp/x.db seed=1 model.width=0.5 tracking.run_name=me@work"
    assert without_passwords(line) == line
    assert without_passwords("tracking.uri=http://me:a b@c@host seed=1 x=me@work") == (
        "tracking.uri=http://***@host seed=1 x=me@work"
    )


def test_every_promise_names_a_test_that_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (TESTS / "README.md").read_text())
    assert len(named) > 40
    for file, name in named:
        functions = {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if hasattr(node, "name")}
        assert name in functions, f"{file}::{name}"
