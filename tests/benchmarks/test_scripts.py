"""The scripts in benchmarks/ can be imported: no renamed module or function breaks one unseen."""

import importlib
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = ("blosc2", "litdata", "litdata.streaming", "pcodec", "tensorstore")
"""Packages that a benchmark compares with; dtcache does not need them."""


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_script_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of ours that a script imports exists; stubs stand for packages of peers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, MagicMock())
    script = importlib.import_module(name)
    source = (BENCHMARKS / f"{name}.py").read_text("utf-8")
    assert "__main__" not in source or callable(script.main)
