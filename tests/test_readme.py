"""The README says what is there."""

import re

import pytest
from readme import README, table

from resnet_cifar.hydra_setup import CONF

PRESETS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def test_the_presets_table_and_the_folder_name_the_same_presets():
    assert sorted(row[0].strip("`") for row in table("Presets")) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_row_has_its_command_its_time_and_result_and_links_its_study(preset):
    [row] = [row for row in table("Presets") if row[0].strip("`") == preset]
    assert f"experiment={preset}" in row[2]
    assert all(row)
    assert re.search(r"\]\(experiments/[^)]+\)", " ".join(row))


def test_the_files_that_are_linked_are_there():
    links = re.findall(r"\]\((?!http|#)([^)#]+)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not (README.parent / link).exists()] == []
