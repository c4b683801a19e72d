"""Failures of the machine end in one line: memory, threads, and names that no locale holds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from pipelines.terminal.commands import Group


def failing(error: Exception) -> Result:
    """Return the result of a verb that raises `error`."""
    group = Group("main")

    @group.command("fail")
    def fail() -> None:
        raise error

    return CliRunner().invoke(group, ["fail"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "too little memory (MemoryError); end other programs, or allow"),
        (
            ImportError("libx.so: failed to map segment from shared object"),
            "too little memory (libx.so: failed to map segment from shared object)",
        ),
        (RuntimeError("could not create a primitive"), "too little memory (could not create a"),
        (OSError(12, "Cannot allocate memory"), "too little memory ([Errno 12] Cannot allocate"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: \x1b[2J"),
            r"can't allocate memory: \x1b[2J); end other programs",
        ),
        (RuntimeError("can't start new thread"), "too few threads or processes (can't start new"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "too few threads or processes"),
        (
            PermissionError(13, "Permission denied", "/root/\x1bx"),
            r"/root/\x1bx: Permission denied; check the path, its rights and the disk",
        ),
        (OSError(5, "Input/output error", b"a/b"), "a/b: Input/output error; check the path"),
        (
            UnicodeEncodeError("utf-8", "a\udce9", 1, 2, "surrogates not allowed"),
            r"'a\udce9': expected text that can be encoded as utf-8; rename it, or set LC_ALL",
        ),
    ],
)
def test_a_failure_of_the_machine_is_one_line(error: Exception, line: str) -> None:
    """The line says what is missing and how to allow more of it; the exit code is 1."""
    result = failing(error)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ") and line in result.stderr


def test_the_line_of_a_subgroup_is_not_wrapped() -> None:
    """A verb such as `label write` ends in the same line as a verb of one word."""
    group = Group("main")

    @group.group("label", cls=Group)
    def label() -> None:
        """A subgroup."""

    @label.command("fail")
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    result = CliRunner().invoke(group, ["label", "fail"])
    assert result.stderr.count("too few threads") == 1


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    """Any other exception is a defect, and is not hidden."""
    error = RuntimeError("expected 3 channels")
    assert failing(error).exception is error


ONE_THREAD = """
import ctypes, os, resource, sys
import cli
if os.geteuid() == 0:
    # The limit does not bind root. Another user who may read every file: CAP_DAC_OVERRIDE is kept.
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    os.setresuid(65534, 65534, 65534)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capset(header, (ctypes.c_uint32 * 6)(2, 2, 0, 0, 0, 0)) == 0
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
cli.main(sys.argv[1:])
"""
LITTLE_SPACE = """
import resource, sys
import cli
import pipelines.verify.verify, dtcache.store.read_kernel
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and capabilities of Linux")
@pytest.mark.parametrize(
    ("program", "line"),
    [(ONE_THREAD, "too few threads or processes"), (LITTLE_SPACE, "too ")],
    ids=["ulimit -u", "ulimit -v"],
)
def test_a_process_under_limits_ends_in_one_line(
    tiny_cache: Path, tmp_path: Path, program: str, line: str
) -> None:
    """`verify` under a real limit of threads, or of address space, ends in one line."""
    # access(2) grants no capabilities: the relative path has folders that everyone may read.
    tmp_path.chmod(0o755)
    shutil.copytree(tiny_cache, tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", "cache"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: {line}")
    assert "Traceback" not in done.stderr


def test_names_beyond_ascii_under_lang_c(tiny_cache: Path, tmp_path: Path) -> None:
    """With LANG=C and no UTF-8 mode, a cache whose path is not ASCII is read."""
    shutil.copytree(tiny_cache, tmp_path / "\u65e5\u672c")
    ascii_only = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | ascii_only | {"PYTHONPATH": str(Path(__file__).parents[3])}
    code = (
        "import os, sys, cli\n"
        "name = os.listdir('.')[0]\n"
        "for words in (['verify', name], ['inspect', name, '--json']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as end: print('exit', end.code, file=sys.stderr)\n"
        "open('config.toml', 'w', encoding='utf-8').write('images = \"\\u65e5\"')\n"
        "cli.main(['verify', name, '--repair', '--config', 'config.toml'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stderr.splitlines()
    assert lines[:2] == ["exit 0", "exit 0"], run.stderr
    assert run.returncode in (1, 2) and len(lines) == 3
    assert lines[2].startswith("Error: ")
    assert "expected text that can be encoded as ascii; rename it, or set LC_ALL" in lines[2]


@pytest.mark.parametrize("kind", [click.ClickException, KeyboardInterrupt])
def test_other_endings_are_left_alone(kind: type[BaseException]) -> None:
    """An error of click and an interrupt keep their own exit codes, 1 and 130."""
    group = Group("main")

    @group.command("fail")
    def fail() -> None:
        raise kind("x") if kind is click.ClickException else kind

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == (1 if kind is click.ClickException else 130)
    assert "too" not in result.stderr
