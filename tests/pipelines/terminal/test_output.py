"""Text from a file cannot control a terminal: its control characters are shown as escapes."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Group
from rich.table import Table

from pipelines.terminal.commands import Group as CommandGroup
from pipelines.terminal.console import Terminal
from pipelines.terminal.output import report, say
from pipelines.terminal.progress import track
from pipelines.terminal.text import printable

HOSTILE = "[red]a[/red] :bomb: \x1b]0;title\x07\x9b2J\u202egnp\rb\x7f\udc80[/]"
SHOWN = r"[red]a[/red] :bomb: \x1b]0;title\x07\x9b2J\u202egnp\rb\x7f\udc80[/]"


def test_control_characters_are_shown_as_escapes() -> None:
    """C0 and C1 controls, marks of direction, separators of lines and surrogates become escapes."""
    assert printable(HOSTILE) == SHOWN
    assert printable("\u200e\u061c\u2028\u2066") == r"\u200e\u061c\u2028\u2066"
    kept = "caf\u00e9 \u5c71\u5ddd\nnext line \N{CAT FACE}"
    assert printable(kept) == kept


def test_a_line_is_one_line_without_controls(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines on stdout and stderr show controls as escapes and have no line break inside."""
    report(f"x\n{HOSTILE}")
    say(f"y\n{HOSTILE}")
    printed = capsys.readouterr()
    assert printed.out == f"x {SHOWN}\n"
    assert printed.err == f"y {SHOWN}\n"


def test_a_table_shows_text_literally() -> None:
    """Titles, headings, cells and lines are no markup, no emoji codes, and control nothing."""
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console = Terminal(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(Group(table, HOSTILE))
    assert capture.get().count(SHOWN) == 5
    assert not set(capture.get()) & set("\x1b\x07\x9b\u202e\r\x7f")


def test_a_progress_bar_shows_text_literally(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A title and a note from a file are shown literally in the bar of a terminal."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "400"}.items():
        monkeypatch.setenv(name, value)
    with track(HOSTILE, 2) as progress:
        progress.advance(1, HOSTILE)
        progress.advance(1, HOSTILE)
    shown = capsys.readouterr().err
    assert shown.count(SHOWN) >= 2
    assert "\x1b]0" not in shown and "\x07" not in shown and "\u202e" not in shown


def test_a_warning_of_a_library_controls_nothing() -> None:
    """A warning whose text comes from a file is printed with its controls as escapes."""
    group = CommandGroup("main")
    group.command("warn")(lambda: warnings.warn(HOSTILE, UserWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        CliRunner().invoke(group, ["warn"])
    assert [str(warning.message) for warning in printed] == [SHOWN]


def test_an_encoding_without_a_letter_prints_its_escape(tmp_path: Path) -> None:
    """On a Latin-1 stdout, other letters of a name are printed as escapes."""
    words = ["scenes", "--count", "1", "--size", "16", "--out", "\u5c71"]
    root = str(Path(__file__).parents[3])
    latin_1 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "latin-1", "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-m", "cli", *words],
        env=os.environ | latin_1,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert r"\u5c71/images: 1 scenes" in run.stdout
