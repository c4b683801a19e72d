"""--help: whole sentences, verbs by stage, and options under headings."""

import dataclasses
import re

import click
import pytest
from click.testing import CliRunner

from cli import main
from dtcache.options import Options, option
from pipelines.terminal.commands import Group
from pipelines.terminal.flags import options_of, out_flag
from pipelines.terminal.hints import commands_of

COMMANDS = commands_of(main)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TwoGroups(Options):
    """Options of two groups, and one without a group."""

    size: int = option(3, "A size.", group="Images")
    rate: float | None = option(None, "A rate.", group="Loss")
    crop: bool = option(True, "Crop.", group="Images")
    name: str = option("x", "A name.")


def help_of(options: type) -> str:
    """Return the help of a verb with these options and --out."""

    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    @out_flag("A folder.")
    @options_of(options)
    def verb() -> None: ...

    return CliRunner().invoke(group, ["verb", "--help"]).output


def test_options_stand_under_the_headings_of_their_groups() -> None:
    """Groups come in the order of first appearance, and options without a group are under Run."""
    text = help_of(TwoGroups)
    headings = re.findall(r"^(\w+):$", text, re.M)
    assert headings == ["Run", "Images", "Loss"]
    run, images, loss = re.split(r"\n(?:Images|Loss):\n", text.split("\nRun:\n")[1])
    assert re.findall(r"^  (-[-\w]+)", run, re.M) == ["--out", "--config", "--name", "--help"]
    assert re.findall(r"^  (-[-\w]+)", images, re.M) == ["--size", "--crop"]
    assert re.findall(r"^  (-[-\w]+)", loss, re.M) == ["--rate"]
    befores = re.findall(r"^( .*?)(?:A folder|A size|A rate|Crop)\.", text, re.M)
    assert len(befores) == 4
    assert len({len(before) for before in befores}) == 1


def test_a_verb_without_groups_has_one_list() -> None:
    """A verb without option groups has a single list with the heading Options."""

    @dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
    class Plain(Options):
        size: int = option(3, "A size.")

    assert re.findall(r"^(\w+):$", help_of(Plain), re.M) == ["Options"]


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_lists_of_verbs_show_whole_sentences(verb: str) -> None:
    """Each verb's first paragraph is one short sentence, which no list of verbs truncates."""
    *group, name = verb.split()
    sentence = (COMMANDS[verb].help or "").split("\n\n")[0]
    assert len(sentence) <= 60
    assert sentence.endswith(".")
    output = CliRunner().invoke(main, [*group, "--help"]).output
    assert re.search(rf"^  {name} +{re.escape(sentence)}$", output, re.M)


def test_verbs_stand_under_their_stages() -> None:
    """Verbs are listed by stage, from those that need nothing to those that need a cache."""
    output = CliRunner().invoke(main, ["--help"]).output
    headings = [line for line in output.splitlines() if re.match(r"\w.*:$", line)]
    assert headings == [
        "Options:",
        "Try it:",
        "Stage 0: the teacher:",
        "Stage 1: the cache:",
        "Stage 2: students:",
        "Help:",
    ]
