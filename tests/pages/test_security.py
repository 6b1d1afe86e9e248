"""SECURITY.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing(text: str) -> list[str]:
    """Tests that a text names and no file of tests defines."""
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)
    }
    return [name for name in re.findall(r"`(test_\w+)`", text) if name not in defined]


def test_every_line_of_the_security_page_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    rows = [row for row in rows if row != "| they cannot | test |"]
    assert len(rows) > 10
    assert [row for row in rows if not re.search(r"`test_\w+` \|$", row)] == []
    assert missing(text) == []


def test_a_test_that_is_not_there_is_found() -> None:  # the control
    assert missing("| it cannot | `test_nowhere_at_all` |") == ["test_nowhere_at_all"]
