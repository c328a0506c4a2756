"""The README as data: the code and the table under a heading."""

import re
import textwrap
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^##+ {heading}\n(.*?)(?=^##+ |\Z)", README.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"README.md has no heading '{heading}'"
    return found[1]


def code_block(heading: str) -> str:
    """The first block of Python under a heading."""
    return code_blocks(heading, "python")[0]


def code_blocks(heading: str, language: str) -> list[str]:
    """All blocks of a language under a heading, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", section(heading), re.S | re.M)
    return [textwrap.dedent(block) for _, block in found]


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head, as cells."""
    rows = [line.strip().strip("|").split("|") for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]
