"""The click classes of all verbs: grouped help, one-line errors with a hint, exit codes, Ctrl-C."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from dtcache.errors import (
    CacheMismatchError,
    CacheNotFoundError,
    ConfigError,
    DtcacheError,
    ImagesNotFoundError,
    NoLocksWarning,
    TeacherNotFoundError,
    UnknownLabelsError,
)
from pipelines.terminal.field_names import in_flags
from pipelines.terminal.hints import hint_for_flag, hint_for_verb, see_help
from pipelines.terminal.machine_errors import long_name, machine_problem
from pipelines.terminal.output import escape_unencodable, say
from pipelines.terminal.text import printable

WRITES_NOTHING = "dtcache.writes_nothing"
"""Key of a context's `meta`. A verb sets this key if it writes nothing that could be resumed."""

MISUSES = (
    ConfigError,
    ImagesNotFoundError,
    TeacherNotFoundError,
    CacheNotFoundError,
    CacheMismatchError,
    UnknownLabelsError,
)
"""Errors that the user mends in the command or in a file of options. Their exit code is 2.

All other errors, of images, teachers, caches, runs or the machine, have the exit code 1.
"""

RUN_GROUP = "Run"
"""Heading for options without a group, in the help of a command that has groups."""


class GroupedOption(click.Option):
    """An option, and the heading under which `--help` lists it."""

    def __init__(self, *declarations: Any, group: str = "", **settings: Any) -> None:
        super().__init__(*declarations, **settings)
        self.group = group


class WrongUsage(click.UsageError):
    """A usage error shown as one line. Its exit code is 2."""

    def show(self, file: Any = None) -> None:
        """Print the line on stderr."""
        click.echo(f"Error: {printable(self.format_message())}", file=file, err=file is None)


class _OneLineErrors(click.Command):
    """Reports a wrong flag, argument or value as one line that says what to use.

    `section` is the command's heading in the help of its group.
    """

    def __init__(self, *arguments: Any, section: str = "Commands", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command's name. Raises WrongUsage if they are wrong."""
        try:
            return super().parse_args(ctx, args)
        except (click.exceptions.NoArgsIsHelpError, WrongUsage):
            raise
        except click.NoSuchOption as error:
            flag = error.option_name
            hint = hint_for_flag(flag, self, verb_of(ctx), ctx.find_root().command)
            raise WrongUsage(f"No such option: {flag}. {hint}", ctx) from error
        except click.UsageError as error:
            line = " ".join(error.format_message().split()).rstrip(".")
            raise WrongUsage(f"{line}. {see_help(verb_of(ctx))}", ctx) from error


class Command(_OneLineErrors):
    """A verb. If `resumes` is true, running the same command again resumes an interrupted one."""

    def __init__(self, *arguments: Any, resumes: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.resumes = resumes

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, which are in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                group = getattr(parameter, "group", "") or RUN_GROUP
                sections.setdefault(group, []).append(record)
        names = [name for records in sections.values() for name, _ in records]
        width = max((len(name) for name in names if len(name) <= 30), default=0)
        for title, records in sections.items():
            with formatter.section(title if len(sections) > 1 else "Options"):
                # One column for the help texts of all sections.
                formatter.write_dl([(name.ljust(width), text) for name, text in records])


class Group(_OneLineErrors, click.Group):
    """A group of verbs. It shows dtcache's errors as one line, and ends with 130 on Ctrl-C."""

    command_class = Command
    group_class = type  # click then makes subgroups of this class too

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs' names in the order of their definition."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs under their headings, each with the first sentence of its help."""
        sections: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands), default=0)
        for name, command in self.commands.items():
            section = command.section if isinstance(command, _OneLineErrors) else "Commands"
            line = (name.ljust(width), command.get_short_help_str(limit=60))
            sections.setdefault(section, []).append(line)
        for title, lines in sections.items():
            with formatter.section(title):
                formatter.write_dl(lines)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the verb's name, the verb and the words after it. Raises WrongUsage."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            verb = verb_of(ctx)
            words = " ".join(("dtcache", *verb.split(), args[0]))
            raise WrongUsage(f"No such command: {words}. {hint_for_verb(args[0], self, verb)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        escape_unencodable()
        try:
            with _one_line_warnings(lambda: self.get_command(ctx, ctx.invoked_subcommand or "")):
                return super().invoke(ctx)
        except DtcacheError as error:
            line = in_command_words(error, self.get_command(ctx, ctx.invoked_subcommand or ""))
            is_misuse = isinstance(error, MISUSES)
            raise (WrongUsage(line) if is_misuse else click.ClickException(line)) from error
        except click.ClickException:
            raise  # from a subgroup, which has made the line
        except Exception as error:
            if (too_long := long_name(error)) is not None:
                raise WrongUsage(printable(too_long)) from error
            problem = machine_problem(error)
            if problem is None:
                raise
            raise click.ClickException(printable(problem)) from error
        except KeyboardInterrupt:
            verb = self.get_command(ctx, ctx.invoked_subcommand or "")
            resumes = isinstance(verb, Command) and verb.resumes and WRITES_NOTHING not in ctx.meta
            advice = "; run the same command again to resume" if resumes else ""
            click.echo(f"\nInterrupted{advice}.", err=True)
            sys.exit(130)


@contextmanager
def _one_line_warnings(command: Callable[[], click.Command | None]) -> Iterator[None]:
    """Print dtcache's warnings as one line on stderr, and none about the metadata of images."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, NoLocksWarning):
                say(f"warning: {in_flags(str(message), command())}")
            else:
                usual(printable(str(message)), category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.filterwarnings("always", category=NoLocksWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def in_command_words(error: DtcacheError, command: click.Command | None) -> str:
    """Return a library error's message as one printable line, with the command's flags."""
    return printable(in_flags(str(error), command).replace("\n", " "))


def verb_of(ctx: click.Context) -> str:
    """Return a command's words without the program's name, such as `label fit`."""
    return " ".join(ctx.command_path.split()[1:]) if ctx.parent is not None else ""
