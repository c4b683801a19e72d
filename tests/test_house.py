"""The house: imports go only downwards, and the names at the top level are the agreed ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from store.builders import tiny_plan, write_cache

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"dtcache._version", "dtcache.errors"},
    {
        "dtcache.recipe",
        "dtcache.hashing",
        "dtcache.options",
        "dtcache.options.toml",
        "dtcache.payloads",
        "dtcache.whitening",
        "dtcache.samples",
        "dtcache.atomic_files",
    },
    {
        "dtcache.device",
        "dtcache.images",
        "dtcache.teacher",
        "dtcache.codec",
        "dtcache.losses.features",
        "dtcache.student",
        "dtcache.labels",
        "dtcache.losses.objective",
    },
    {"dtcache.store"},
    {
        "dtcache.cache.batch",
        "dtcache.cache.cache",
        "dtcache.cache.fitted_codec",
        "dtcache.cache.selection",
        "dtcache.cache.label_set",
        "dtcache.cache.loader",
        "dtcache.cache.dask_array",
    },
    {"pipelines"},
    {"cli"},
]
PUBLIC = ("dtcache",)
"""What gathers names of all floors for users."""
SOURCES = [
    p for folder in ("dtcache", "pipelines") for p in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "cli.py"]


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from dtcache import losses` names a module, `from dtcache.losses.features import mse_loss` is in one.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def floor_of(module: str) -> int | None:
    """Return the floor of one of our modules, or None for one of others."""
    for floor, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return floor
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_only_downwards(path: Path) -> None:
    """A module imports nothing from a floor above its own."""
    module = (
        path.relative_to(ROOT)
        .with_suffix("")
        .as_posix()
        .replace("/", ".")
        .removesuffix(".__init__")
    )
    own = len(FLOORS) if module in PUBLIC else floor_of(module)
    assert own is not None, f"{module} is on no floor"
    for imported in imports_of(path):
        theirs = floor_of(imported)
        assert theirs is None or theirs <= own, f"{module} imports {imported} from above"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("diffusers", "dtcache/teacher"),
        ("transformers", "dtcache/teacher"),
        ("timm", "dtcache/student"),
        ("click", ("cli.py", "pipelines/terminal/")),
        ("dask.distributed", "pipelines/extract/workers/"),
        ("segmentation_models_pytorch", "dtcache/student/segmentation_heads.py"),
    ],
)
def test_a_library_is_imported_in_one_place_only(
    library: str, homes: str | tuple[str, ...]
) -> None:
    """Only teacher imports diffusers and transformers, only student timm, only the command line click, only cluster
    Dask's scheduler, only heads segmentation-models-pytorch.
    """
    users = {
        p.relative_to(ROOT).as_posix()
        for p in SOURCES
        if any(f"{m}.".startswith(f"{library}.") for m in imports_of(p))
    }
    assert users
    assert all(user.startswith(homes) for user in users)


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
        "import dtcache; dtcache.open",
        "import dtcache.store.summary",
        "import pipelines.inspect.inspect",
        "import dtcache.store.reader",
        "import pipelines.extract.workers",
        "verify",
    ],
)
def test_looking_loads_no_heavy_library(code: str, tmp_path: Path) -> None:
    """--help, inspect and a whole verify, with the plan of a repair, run without torch, diffusers, timm or numba."""
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
