"""Tables on the terminal. Text that came from a file cannot control the terminal."""

from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from pipelines.terminal.text import printable


class Terminal(Console):
    """A console that prints every string literally, without markup, with controls as escapes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a string, such as a cell or a title, as text of a table."""
        return super().render_str(printable(text), **settings)


def show(result: RenderableType, *, to_stderr: bool = False) -> None:
    """Print tables and lines."""
    Terminal(stderr=to_stderr).print(result)
