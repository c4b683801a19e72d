"""The Python code in docs/students.md runs as printed."""

import re
from pathlib import Path

import pytest
import torch
from store.builders import tiny_plan, write_cache
from torch import nn

DOC = Path(__file__).resolve().parents[2] / "docs" / "students.md"


class Pair(nn.Module):
    """A custom network with two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 4, 4)
        self.coarse = nn.Conv2d(4, 6, 2, 2)

    def forward(self, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Return maps at strides 4 and 8."""
        fine = self.fine(images_BCHW)
        return [fine, self.coarse(fine)]


def test_the_documented_loop_trains_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented loop trains a custom module: its weights change and the loss is finite."""
    write_cache(tmp_path / "cats.cache", tiny_plan())
    monkeypatch.chdir(tmp_path)
    (block,) = (
        code
        for code in re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
        if "MyNetwork" in code
    )
    network = Pair()
    before = network.fine.weight.detach().clone()
    scope = {"MyNetwork": lambda: network}
    exec(block.replace("batch_size=256", "batch_size=3"), scope)
    assert torch.isfinite(scope["loss"])
    assert not torch.equal(network.fine.weight, before)
