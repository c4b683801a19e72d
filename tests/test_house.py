"""Imports go only downwards, without a circle, and the top level has the agreed names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from store.builders import tiny_plan, write_cache

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    # The parts, from low to high.
    "dtcache._version",
    "dtcache.errors",
    "dtcache.arguments",
    "dtcache.names",
    "dtcache.regular_files",
    "dtcache.hashing",
    "dtcache.json_files",
    "dtcache.recipe",
    "dtcache.payloads",
    "dtcache.rng",
    "dtcache.row_set",
    "dtcache.kernels",
    "dtcache.options",
    "dtcache.samples",
    "dtcache.class_names",
    "dtcache.atomic_files",
    "dtcache.device",
    "dtcache.process_settings",
    "dtcache.device_clock",
    "dtcache.device_memory",
    "dtcache.compilation",
    "dtcache.build_limit",
    "dtcache.distributed",
    "dtcache.optim",
    "dtcache.whitening",
    "dtcache.metrics",
    "dtcache.images",
    "dtcache.codec",
    "dtcache.losses",
    "dtcache.student",
    "dtcache.teacher",
    "dtcache.labels",
    "dtcache.storage",
    "dtcache.store",
    "dtcache.cache",
    # The stages, from low to high.
    "pipelines",
    "pipelines.terminal",
    "pipelines.runs",
    "pipelines.write_scenes",
    "pipelines.convert_adm",
    "pipelines.make_teacher",
    "pipelines.describe_teacher",
    "pipelines.teach",
    "pipelines.size_estimate",
    "pipelines.disk_space",
    "pipelines.doctor",
    "pipelines.extract",
    "pipelines.train",
    "pipelines.label",
    "pipelines.evaluate",
    "pipelines.probe_teacher",
    "pipelines.export",
    "pipelines.inspect",
    "pipelines.sweep",
    "pipelines.verify",
    "pipelines.demo",
    "pipelines.library",
    "cli",
    # The face of the package, which imports the verbs when they are first used. It is the only file
    # of dtcache/ that may name `pipelines`.
    "dtcache",
]
"""A module may import from its own room and from the rooms before it."""
FLAT = ("dtcache", "pipelines")
"""Packages whose rooms are listed one by one: the name alone stands for the package's own
`__init__`.
"""
SOURCES = [
    path for folder in ("dtcache", "pipelines") for path in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "cli.py"]


def module_of(path: Path) -> str:
    """Return the dotted name of a source file."""
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from dtcache import losses` names a module, `from dtcache.losses import mse_loss` a
            # member.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(module: str) -> set[str]:
    """Return the modules of this repository that a module imports, without parent packages."""
    names = imports_of(MODULES[module]) & set(MODULES)
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)} - {
        module
    }


def room_of(module: str) -> str | None:
    """Return the room that a module lies in, or None if it lies in none."""
    inside = (room for room in ROOMS if module.startswith(f"{room}.") and room not in FLAT)
    return module if module in ROOMS else next(inside, None)


GRAPH = {module: own_imports(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_only_downwards(module: str) -> None:
    """A module imports from its own room and from lower rooms, never from a higher one."""
    room = room_of(module)
    assert room is not None, f"{module} lies in no room of this list"
    for imported in GRAPH[module]:
        theirs = room_of(imported)
        assert theirs is not None, f"{imported} lies in no room of this list"
        assert ROOMS.index(theirs) <= ROOMS.index(room), f"{module} imports {imported} from above"


def test_every_room_of_the_list_exists() -> None:
    """Every room in the list has a module in the repository."""
    assert set(ROOMS) == {room_of(module) for module in MODULES}


def test_no_import_circle() -> None:
    """The import graph has no circle, inside packages too."""
    graph = dict(GRAPH)
    while ready := [module for module, imported in graph.items() if not imported & set(graph)]:
        for module in ready:
            del graph[module]
    assert not graph, f"these modules import each other, or depend on ones that do: {sorted(graph)}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("diffusers", "dtcache/teacher"),
        ("transformers", "dtcache/teacher"),
        ("timm", ("dtcache/student", "dtcache/optim.py")),
        ("click", ("cli.py", "pipelines/terminal/")),
        ("dask.distributed", "pipelines/extract/workers/"),
        ("segmentation_models_pytorch", "dtcache/student/segmentation_heads.py"),
    ],
)
def test_a_library_is_imported_in_one_place_only(
    library: str, homes: str | tuple[str, ...]
) -> None:
    """Each third-party library is imported in one place only, so that replacing it is local."""
    users = {
        p.relative_to(ROOT).as_posix()
        for p in SOURCES
        if any(f"{m}.".startswith(f"{library}.") for m in imports_of(p))
    }
    assert users
    assert all(user.startswith(homes) for user in users)


def calls_of(path: Path) -> set[str]:
    """Return the names of the functions that a file calls, such as `print` or `click.echo`."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def test_only_the_terminal_package_prints() -> None:
    """Only pipelines/terminal prints: it shows the control characters in names as escapes."""
    prints = {"print", "click.echo", "Console", "sys.stdout.write", "sys.stderr.write"}
    markup = {"rich.console.Console", "rich.markup", "rich.text"}
    outside = [p for p in SOURCES if not p.is_relative_to(ROOT / "pipelines" / "terminal")]
    assert [p for p in outside if calls_of(p) & prints or imports_of(p) & markup] == []


VERIFY = """
import cli
try:
    cli.main(["verify", {folder!r}, "--repair", "--dry-run"])
except SystemExit as done:
    assert done.code == {code}
"""


@pytest.mark.parametrize(
    "code",
    [
        "import cli",
        "import dtcache; dtcache.open; dtcache.ExtractOptions; dir(dtcache)",
        "import dtcache.store.summary",
        "import pipelines.inspect.inspect",
        "import dtcache.store.reader",
        "import pipelines.extract.workers",
        "verify",
    ],
)
def test_looking_loads_no_heavy_library(code: str, tmp_path: Path) -> None:
    """--help, inspect and verify with a repair plan load no torch, diffusers, timm or numba."""
    if code == "verify":
        root = write_cache(tmp_path / "cache", tiny_plan())
        (root / "shards.parquet").unlink()
        code = VERIFY.format(folder=str(root), code=3)
    heavy = "[m for m in ('torch', 'diffusers', 'timm', 'numba') if m in sys.modules]"
    out = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint({heavy})"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert out.stdout.splitlines()[-1] == "[]"
