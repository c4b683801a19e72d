"""Lines on stdout and stderr. Text that came from a file cannot control the terminal."""

import sys

import click

from pipelines.terminal.field_names import in_flags
from pipelines.terminal.listener import Progress, listener
from pipelines.terminal.text import printable


def report(line: str) -> None:
    """Print one line of a result on stdout."""
    _print(line, to_stderr=False)


def report_lines(text: str) -> None:
    """Print text that dtcache itself has made, such as a script, on stdout with its line ends."""
    click.echo(text)


def say(line: str) -> None:
    """Print one line on stderr, with the flags of the running command for fields in backticks."""
    if (listen := listener()) is not None:
        listen(Progress(title="", note=line))
        return
    context = click.get_current_context(silent=True)
    _print(in_flags(line, context.command if context is not None else None), to_stderr=True)


def _print(line: str, *, to_stderr: bool) -> None:
    click.echo(printable(line.replace("\n", " ")), err=to_stderr)


def escape_unencodable() -> None:
    """Print characters that the encoding of stdout or stderr lacks as escapes such as `\\xe9`.

    ASCII, the encoding of LANG=C, lacks most characters of names.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
