"""`dtcache doctor` and `dtcache completion`: what they say of this machine and of the commands."""

import errno
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from support.cli import run

from cli import main
from dtcache._version import __version__
from pipelines import doctor
from pipelines.terminal.console import Terminal


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure a small file, and each convolution once."""
    monkeypatch.setattr(doctor, "DISK_BYTES", 2**16)
    monkeypatch.setattr(doctor, "SECONDS", 0.0001)


def test_json_describes_the_machine_and_the_folder(tmp_path: Path) -> None:
    """The JSON agrees with other sources, the lock is exclusive, and the folder is left empty."""
    report = json.loads(run("doctor", tmp_path, "--json").stdout)
    assert report["versions"]["dtcache"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["cores"] == len(psutil.Process().cpu_affinity())
    assert report["memory_bytes"] == psutil.virtual_memory().total
    names = [device["name"] for device in report["devices"]]
    assert names == ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    assert all(d["fp32_ms"] > 0 and d["bf16_ms"] > 0 for d in report["devices"])
    flags = Path("/proc/cpuinfo").read_text().split()
    assert all(name in flags for name in report["instructions"])
    disk = report["disk"]
    assert disk["folder"] == str(tmp_path)
    assert disk["lock"] == "exclusive"
    assert disk["folder_fsync"] is True
    assert disk["write_bytes_per_second"] > 0 and disk["read_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_terminal_shows_the_same_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables name the version, set variables, the precision of auto and the locks."""
    monkeypatch.setenv("DTCACHE_NO_LOCK", "1")
    diagnosis = doctor.diagnose(tmp_path)
    console = Terminal(width=300, file=io.StringIO())
    console.print(diagnosis.render())
    text = console.file.getvalue()
    assert f"dtcache {__version__}" in text
    assert "DTCACHE_NO_LOCK=1" in text
    assert f"auto is {diagnosis.devices[0].auto_precision}" in text
    assert "switched off by DTCACHE_NO_LOCK" in text


def test_file_systems_without_locks_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is `unsupported` if flock does not exist, and `shared` if it excludes nobody."""

    def missing(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", missing)
    assert doctor.diagnose(tmp_path).to_json()["disk"]["lock"] == "unsupported"
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)
    assert doctor.diagnose(tmp_path).to_json()["disk"]["lock"] == "shared"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk ends with one line and exit code 1, and leaves nothing behind."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = run("doctor", tmp_path)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"cannot write {tmp_path}: No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_dtcache(shell: str) -> None:
    """Each script completes `dtcache` through click's variable and the shell's own protocol."""
    script = run("completion", shell).stdout
    assert f"_DTCACHE_COMPLETE={shell}_complete" in script
    assert "_dtcache_completion" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_completion_offers_verbs_and_choices() -> None:
    """What the bash script asks for: verbs that begin as typed, and the choices of an option."""

    def offered(words: str, index: int) -> list[str]:
        variables = {
            "_DTCACHE_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(index),
        }
        result = CliRunner().invoke(main, [], prog_name="dtcache", env=variables)
        return [line.partition(",")[2] for line in result.stdout.splitlines()]

    assert offered("dtcache ex", 1) == ["extract", "export"]
    assert offered("dtcache teacher s", 2) == ["show"]
    assert offered("dtcache extract --quality ", 3) == ["high", "default", "small", "fp16"]
