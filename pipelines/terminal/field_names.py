"""Turns the fields that library messages name in backticks into a command's flags and arguments."""

import ast
import re
import shlex
from typing import Any

import click

_FIELD = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def in_flags(message: str, command: click.Command | None) -> str:
    """Return a library message in the words of a command.

    For a command that has the options, `batch_size` becomes --batch-size, `encoding='ddim'` becomes
    --encoding ddim, `timestep=(50, 150)` becomes --timestep 50 --timestep 150, `flip=False` becomes
    --no-flip, and `size=None` becomes no --size. The name of an argument becomes its metavar. Other
    text in backticks stays.
    """
    parameters = {p.name: p for p in command.params} if command is not None else {}

    def words(match: re.Match[str]) -> str:
        name, value = match.groups()
        parameter = parameters.get(name)
        if isinstance(parameter, click.Option):
            return parameter.opts[0] if value is None else _with_value(parameter, value)
        if isinstance(parameter, click.Argument) and value is None:
            return parameter.human_readable_name
        return match.group(0)

    return _FIELD.sub(words, message)


def _with_value(option: click.Option, text: str) -> str:
    """Return an option with a value, a Python literal or plain text, as a user would type them."""
    flag = option.opts[0]
    try:
        value: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if value is None:
        return f"no {flag}"
    if option.is_flag:
        if value:
            return flag
        return option.secondary_opts[0] if option.secondary_opts else f"no {flag}"
    if isinstance(value, tuple | list):
        return " ".join(f"{flag} {shlex.quote(str(item))}" for item in value)
    return f"{flag} {shlex.quote(str(value))}"
