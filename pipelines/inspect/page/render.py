"""Rendering a template to a page on disk, within a size limit."""

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from dtcache._version import __version__
from dtcache.atomic_files import write_file
from dtcache.errors import ConfigError
from pipelines.terminal.text import byte_size

MAX_BYTES = 10_000_000


def write_page(
    path: Path, template: str, values: dict[str, Any], *, package: str = "pipelines.inspect"
) -> None:
    """Render a template and write the page.

    `package` has the template in its folder `page`; it may extend and include the templates of
    this folder. Raises ConfigError if the page exceeds 10 MB, and DiskError.
    """
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader(package, "page"), PackageLoader("pipelines.inspect", "page")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = byte_size
    text = environment.get_template(template).render(version=__version__, **values)
    # A name that is not UTF-8 is shown with escapes.
    page = text.encode(errors="backslashreplace")
    if len(page) > MAX_BYTES:
        raise ConfigError(
            f"`report` {path}: expected a page of at most {MAX_BYTES} bytes, got {len(page)}; "
            "pass a smaller `gallery`"
        )
    write_file(path, page)
