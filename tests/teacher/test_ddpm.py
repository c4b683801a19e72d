"""A teacher that cannot be saved."""

import errno
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors import SafetensorError

from dtcache.teacher.ddpm import build_unet, save_teacher


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ('Error while serializing: IoError(Os { code: 28, message: "No space" })', errno.ENOSPC),
        ("Error while serializing: unknown", errno.EIO),
    ],
)
def test_a_full_disk_is_an_error_of_the_system(
    message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of safetensors for a failed write becomes an OSError of the same number."""

    def fail(*arguments: object, **options: object) -> None:
        raise SafetensorError(message)

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", fail)
    unet = build_unet(8, 8, (8, 8), layers=1, attention=0)
    with pytest.raises(OSError) as raised:
        save_teacher(unet, tmp_path, torch.float32)
    assert raised.value.errno == code
