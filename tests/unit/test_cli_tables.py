"""Tables of the command line in a narrow terminal."""

import os
import shutil

import pytest
from rich.console import Console

from anybatch.cli import render
from command_line import Terminal

NAMES = ("dln-sum-digits-20", "dln-sum-digits-40", "dln-sum-digits-40 minus dln-sum-digits-20")
ROWS = [
    {"figure": "training loss", NAMES[0]: "2.202 ± 0.004", NAMES[1]: "2.203", NAMES[2]: "0.0016"},
    {"figure": "held-out loss", NAMES[0]: "2.091 ± 0.007", NAMES[1]: "2.094", NAMES[2]: "0.0027"},
]


def print_rows(monkeypatch: pytest.MonkeyPatch, width: int, *, list_if_wide: bool) -> list[str]:
    """Return the lines that a terminal of some width shows."""
    file = Terminal()
    console = Console(
        file=file, width=width, soft_wrap=True, force_terminal=True, color_system=None
    )
    monkeypatch.setattr(render, "console", console)
    monkeypatch.setattr(render, "print_text", lambda text: print(text, file=file))
    size = os.terminal_size((width, 24))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: size)
    render.print_table(ROWS, list_if_wide=list_if_wide)
    return file.getvalue().splitlines()


def test_a_table_too_wide_for_the_terminal_becomes_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = print_rows(monkeypatch, 80, list_if_wide=True)
    assert lines == [
        "training loss",
        "  dln-sum-digits-20: 2.202 ± 0.004",
        "  dln-sum-digits-40: 2.203",
        "  dln-sum-digits-40 minus dln-sum-digits-20: 0.0016",
        "held-out loss",
        "  dln-sum-digits-20: 2.091 ± 0.007",
        "  dln-sum-digits-40: 2.094",
        "  dln-sum-digits-40 minus dln-sum-digits-20: 0.0027",
    ]


def test_a_table_that_fits_stays_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    # 13 + 17 + 17 + 41 characters, 3 of frame and spaces for each column, and 1.
    width = 13 + 17 + 17 + 41 + 4 * 3 + 1
    fits = print_rows(monkeypatch, width, list_if_wide=True)
    assert any(NAMES[2] in line and NAMES[0] in line for line in fits)
    assert max(map(len, fits)) == width
    assert print_rows(monkeypatch, width - 1, list_if_wide=True)[0] == "training loss"
    cut = print_rows(monkeypatch, 80, list_if_wide=False)  # the control: a table cuts the name
    assert not any(NAMES[2] in line for line in cut)
