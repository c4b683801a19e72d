"""The command line as mkdocs-click prints it on the site: as `--help` does, with sections.

mkdocs-click knows neither the sections of options nor examples, so both become part of the text.
"""

import copy
import re

import click

import cli

WIDTH = 88


def documented(command: click.Command, path: str) -> click.Command:
    """Return a copy of a command and its subcommands, with options and examples as code blocks."""
    page = copy.copy(command)
    ctx = click.Context(command, info_name=path, max_content_width=WIDTH, terminal_width=WIDTH)
    formatter = ctx.make_formatter()
    if isinstance(command, click.Group) and isinstance(page, click.Group):
        page.commands = {
            name: documented(child, f"{path} {name}") for name, child in command.commands.items()
        }
        click.Command.format_options(command, ctx, formatter)
    else:
        command.format_options(ctx, formatter)
    options = formatter.getvalue().strip("\n")
    page.help = f"{_fenced(command.help or '')}\n\n```text\n{options}\n```"
    page.params = [p for p in command.params if not isinstance(p, click.Option)]
    page.add_help_option = False
    return page


def _fenced(text: str) -> str:
    """Return help text in which each title with indented lines is a title and a code block."""
    return re.sub(
        r"(?:^\x08\n)?^(\S[^\n]*:)\n((?: +[^\n]*(?:\n|$))+)",
        lambda found: f"{found[1]}\n\n```text\n{found[2].rstrip()}\n```\n",
        "\n".join(line.rstrip() for line in text.splitlines()),
        flags=re.M,
    )


main = documented(cli.main, "dtcache")
