"""The README as data: the code and the table under a heading."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^##+ {heading}\n(.*?)(?=^##+ |\Z)", README.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"README.md has no heading '{heading}'"
    return found[1]


def code_block(heading: str) -> str:
    """The first block of Python under a heading."""
    return re.search(r"```python\n(.*?)```", section(heading), re.S)[1]


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head, as cells."""
    rows = [line.strip().strip("|").split("|") for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]
