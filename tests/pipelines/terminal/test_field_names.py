"""Library messages name fields, and the command line shows the corresponding flags."""

import click
import pytest

from cli import main
from pipelines.terminal.field_names import in_flags


@click.command()
@click.argument("source", metavar="IMAGES")
@click.option("--batch-size")
@click.option("--encoding")
@click.option("--timestep", multiple=True)
@click.option("--flip/--no-flip")
@click.option("--frozen", is_flag=True)
def verb() -> None: ...


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`batch_size` 1: expected at least 2", "--batch-size 1: expected at least 2"),
        ("pass `encoding='ddim'`", "pass --encoding ddim"),
        ("pass `encoding=ddim`", "pass --encoding ddim"),
        ("pass `encoding='a b'`", "pass --encoding 'a b'"),
        ("pass `batch_size=64`", "pass --batch-size 64"),
        ("pass `timestep=(50, 150)`", "pass --timestep 50 --timestep 150"),
        ("pass `flip=True`", "pass --flip"),
        ("pass `flip=False`", "pass --no-flip"),
        ("pass `frozen=False`", "pass no --frozen"),
        ("pass `encoding=None`", "pass no --encoding"),
        ("`source` is empty", "IMAGES is empty"),
        ("`other` and `other=1` and `Encoding` stay", "`other` and `other=1` and `Encoding` stay"),
        ("`encoding` beside `flip`", "--encoding beside --flip"),
    ],
)
def test_fields_become_flags(message: str, shown: str) -> None:
    """Fields, values, lists, switches and arguments become flags; other text in backticks stays."""
    assert in_flags(message, verb) == shown
    assert in_flags(message, None) == message


def test_a_verb_in_a_group_shows_its_own_flags() -> None:
    """A message of a verb in a group shows the verb's own flags."""
    result = click.testing.CliRunner().invoke(
        main, ["label", "fit", "x", "--out", "y", "--batch-size", "0"]
    )
    assert result.exit_code == 2
    assert result.output == "Error: --batch-size 0: expected at least 1\n"
