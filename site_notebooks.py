"""Notebooks as pages of the site: `::: notebook FILE` becomes its text, code and outputs.

A Markdown extension, of which Zensical has none of its own. FILE is a path in docs/.
"""

from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from nbconvert import MarkdownExporter
from traitlets.config import Config

DOCS = Path("docs")
MARK = "::: notebook "
SETTINGS = {
    "ExtractOutputPreprocessor": {"enabled": False},  # pictures become part of the page
    "CoalesceStreamsPreprocessor": {"enabled": True},  # printed lines become one block
}


class _Notebooks(Preprocessor):
    """Replaces each mark by a notebook."""

    def run(self, lines: list[str]) -> list[str]:
        """Return the lines of a page with its notebooks."""
        return [shown for line in lines for shown in _shown(line)]


def _shown(line: str) -> list[str]:
    """Return the notebook that a line names as Markdown, or any other line as it is."""
    if not line.startswith(MARK):
        return [line]
    exporter = MarkdownExporter(config=Config(SETTINGS))
    text, _ = exporter.from_filename(str(DOCS / line.removeprefix(MARK).strip()))
    return str(text).splitlines()


class _Extension(Extension):
    """Registers the preprocessor before the one of fenced code."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Add the preprocessor."""
        md.preprocessors.register(_Notebooks(md), "notebooks", 100)


def makeExtension(**settings: Any) -> Extension:  # noqa: N802
    """Return the extension, as Python-Markdown requires."""
    return _Extension(**settings)
