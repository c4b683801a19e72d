"""The documentation: its links and commands are right, and the site builds from it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import cli
import dtcache
from pipelines.terminal.commands import Group

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES, *sorted((ROOT / "benchmarks").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """Return the page without code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", path.read_text()))


def headings(path: Path) -> set[str]:
    """Return the anchors of a page's headings, by the rule of GitHub."""
    lines = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """Each relative link leads to a file and heading; links of docs/ stay in docs/."""
    text = prose(page)
    targets = [
        *re.findall(r"\]\(([^)\s]+)\)", text),
        *re.findall(r'(?:src|srcset)="([^"]+)"', text),
    ]
    for target in targets:
        link = urlsplit(target)
        if link.scheme:
            continue
        file = (page.parent / link.path).resolve() if link.path else page
        assert file.exists(), target
        assert DOCS not in page.parents or file.is_relative_to(DOCS), f"{target} is not on the site"
        if link.fragment:
            assert link.fragment in headings(file), target


def test_every_page_is_in_the_navigation_once() -> None:
    """The navigation of the site lists each page of docs/ once, and no other."""
    pages: list[str] = []

    def collect(entries: list[dict[str, object]]) -> None:
        for entry in entries:
            for value in entry.values():
                if isinstance(value, list):
                    collect(value)
                else:
                    pages.append(str(value))

    collect(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    assert sorted(pages) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def documented_commands() -> list[tuple[str, str]]:
    """Return (page, command) of each dtcache command in a code block, without lines of `...`."""
    commands = []
    for page in TEXTS:
        for language, block in FENCE.findall(page.read_text()):
            if language not in ("", "bash", "console"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(
                    r"(?:^|--no-python |exec |; do .*? |\b\d+ |&& )dtcache (.*)", line
                )
                if found and "..." not in line and "[" not in line:
                    commands.append((name_of(page), found[1]))
    return commands


def test_commands_in_the_documentation_parse() -> None:
    """Each dtcache command in a code block has a known verb, known flags and all arguments."""
    commands = documented_commands()
    assert len(commands) > 50
    for page, text in commands:
        words = shlex.split(re.split(r" [|&;>]|&$", text)[0], comments=True)
        command: click.Command = cli.main
        ctx = click.Context(command, info_name="dtcache")
        while isinstance(command, Group) and words and not words[0].startswith("-"):
            name, command, words = command.resolve_command(ctx, words)
            assert command is not None
            ctx = click.Context(command, info_name=name, parent=ctx)
        try:
            values, rest, _ = command.make_parser(ctx).parse_args(list(words))
        except click.UsageError as error:
            raise AssertionError(f"{page}: dtcache {text}: {error.format_message()}") from error
        assert not rest, f"{page}: dtcache {text}"
        if not isinstance(command, Group) and "config" not in values and "--help" not in words:
            missing = [
                p.name for p in command.params if p.required and not values.get(p.name or "")
            ]
            assert not missing, f"{page}: dtcache {text}: {missing}"


class _Links(HTMLParser):
    """Collects the anchors and the internal links of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record ids, and the targets of links, images, styles and scripts."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and (tag, value) != ("link", "."):
                self.links.append(value)


@pytest.mark.slow
def test_the_site_builds_without_warnings_or_dead_links(tmp_path: Path) -> None:
    """The strict build succeeds; each internal link of its HTML leads to a file and an anchor."""
    pytest.importorskip("zensical")
    # zensical would follow links to these and write beside them.
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    for name in ("dtcache", "pipelines", "cli.py", "site_commands.py", "site_notebooks.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    site = tmp_path / "build" / "site"
    pages: dict[Path, _Links] = {}
    for file in site.rglob("*.html"):
        pages[file] = _Links()
        pages[file].feed(file.read_text())
    assert len(pages) > len(PAGES)
    reference = pages[site / "reference" / "python" / "index.html"].anchors
    described = {anchor.rpartition(".")[2] for anchor in reference if anchor.count(".") <= 3}
    assert described >= set(dtcache.__all__) - {"__version__"}
    dead = []
    for file, page in pages.items():
        for target in page.links:
            link = urlsplit(target)
            if link.scheme or link.netloc or file.name == "404.html":
                continue
            path = (file.parent / unquote(link.path)).resolve() if link.path else file
            path = path / "index.html" if path.is_dir() else path
            known = pages[path].anchors if path in pages else set()
            if not path.exists() or (link.fragment and unquote(link.fragment) not in known):
                dead.append(f"{file.relative_to(site)}: {target}")
    assert not dead, "\n".join(sorted(set(dead)))
