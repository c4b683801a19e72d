"""A torch module as a teacher: its inputs, what is refused, and what its hashes cover."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher.batches import batch_of
from torch import Tensor, nn

from dtcache.device import resolve_compute
from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import ViewSpec
from dtcache.rng import sample_noise
from dtcache.teacher import CallableTeacher, Teacher, TeacherSettings, load_teacher, prepare_teacher


class Pyramid(nn.Module):
    """Two maps, of strides 2 and 4; the second is in a tuple, as in some networks."""

    class Pair(nn.Module):
        """A convolution whose output is in a tuple."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.conv(x), None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = self.Pair()
        self.unused = nn.Identity()
        self.pooled = nn.AdaptiveAvgPool2d(1)
        self.level = nn.Flatten()

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        first = self.first(x) * scale
        return self.level(self.pooled(self.second(first)[0]))


TAPS = {"stride2": "first", "stride4": "second"}


def made(**changes: Any) -> CallableTeacher:
    return CallableTeacher(
        changes.pop("module", None) or Pyramid(), **{"taps": TAPS, "version": "1", **changes}
    )


def prepared(teacher: CallableTeacher, timestep: int = 0, batch_size: int = 3) -> Teacher:
    return prepare_teacher(
        teacher.loaded(),
        TeacherSettings(
            view=ViewSpec(height=16, width=24), timesteps=(timestep,), batch_size=batch_size
        ),
        resolve_compute("cpu", "fp32"),
    )


def pixels(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 3, 16, 24), np.uint8))


def test_a_plain_network_sees_the_pixels() -> None:
    """Without `prepare`, the module reads images in [-1, 1], and there is no noise."""
    teacher = prepared(made())
    assert [(t.name, t.channels, t.height, t.width) for t in teacher.spec.taps] == [
        ("stride2", 6, 8, 12),
        ("stride4", 8, 4, 6),
    ]
    assert (teacher.is_random, teacher.spec.alpha_bars, teacher.spec.snrs) == (
        False,
        (1.0,),
        (None,),
    )
    two = pixels(2)
    net = Pyramid()
    (found,) = teacher.features(
        batch_of(teacher, two, ["a", "b"], [False, True], seed=0, draws=[0])
    )
    seen = torch.from_numpy(np.stack([two[0], two[1][:, :, ::-1]])).float() / 127.5 - 1
    with torch.inference_mode():
        torch.testing.assert_close(found["t0/stride2"], net.first(seen))
        torch.testing.assert_close(found["t0/stride4"], net.second.conv(net.first(seen)))


def test_prepare_is_called_with_pixels_noise_and_timestep() -> None:
    """`prepare` gets fp32 pixels in [-1, 1], the samples' noise and an int timestep.

    Pixels and noise are padded with zeros. The module receives what `prepare` returns.
    """
    calls = []

    def prepare(pixels_BCHW: Tensor, noise_BCHW: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        calls.append((pixels_BCHW, noise_BCHW, timestep))
        return pixels_BCHW + noise_BCHW.repeat_interleave(4, 2).repeat_interleave(4, 3)[
            :, :3
        ], torch.tensor(2.0)

    teacher = prepared(
        made(prepare=prepare, alpha_bars=(0.9, 0.5, 0.2), noise_channels=5, noise_stride=4),
        timestep=1,
    )
    assert (teacher.is_random, teacher.spec.alpha_bars, teacher.spec.snrs) == (True, (0.5,), (1.0,))
    calls.clear()  # discard the calls of the dry runs
    two = pixels(2)
    (found,) = teacher.features(
        batch_of(teacher, two, ["a", "b"], [False, True], seed=4, draws=[1])
    )
    ((seen, noise, timestep),) = calls
    assert (seen.dtype, noise.dtype, timestep) == (torch.float32, torch.float32, 1)
    mirrored = np.stack([two[0], two[1][:, :, ::-1]])
    torch.testing.assert_close(seen[:2], torch.from_numpy(mirrored).float() / 127.5 - 1)
    wanted = [
        sample_noise((5, 4, 6), seed=4, key=key, timestep=1, draw=1, flip=flip)
        for key, flip in (("a", False), ("b", True))
    ]
    assert torch.equal(noise[:2], torch.from_numpy(np.stack(wanted)))
    assert len(noise) == 3
    assert not noise[2].any()
    with torch.inference_mode():
        large = noise.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :3]
        torch.testing.assert_close(found["t1/stride2"], Pyramid().first(seen + large)[:2])


def test_a_diffusion_network_of_ones_own_gives_the_features_of_the_built_in_way(
    teacher_dir: Path,
) -> None:
    """A U-Net wrapped by hand, with the paper's noising in prepare, equals the built-in way."""
    loaded = load_teacher(str(teacher_dir))
    view = ViewSpec(height=32, width=32)
    settings = TeacherSettings(view=view, taps=("stride1",), timesteps=(150,), batch_size=2)
    a = loaded.alpha_bars[150]

    def prepare(pixels_BCHW: Tensor, noise_BCHW: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        return a.sqrt() * pixels_BCHW + (1 - a).sqrt() * noise_BCHW, torch.full(
            (len(pixels_BCHW),), timestep
        )

    by_hand = CallableTeacher(
        load_teacher(str(teacher_dir)).denoiser.unet,
        taps={"stride8": "up_blocks.0.resnets.1", "stride1": "up_blocks.3"},
        version="1",
        prepare=prepare,
        alpha_bars=loaded.alpha_bars.tolist(),
        size=(32, 32),
    )
    found = []
    for one in (loaded, by_hand.loaded()):
        teacher = prepare_teacher(one, settings, resolve_compute("cpu", "fp32"))
        batch = batch_of(
            teacher, [np.zeros((3, 32, 32), np.uint8)], ["k"], [False], seed=0, draws=[0]
        )
        found.append(next(teacher.features(batch))["t150/stride1"])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": {}}, r"expected at least one tap, such as \{'stride8': 'up\.2'\}"),
        (
            {"taps": {"eight": "first"}},
            r"tap 'eight': expected its stride as the name, such as stride8",
        ),
        (
            {"taps": {"stride2": "third"}},
            r"tap stride2: Pyramid has no module 'third'; it has first, second, second\.",
        ),
        ({"version": ""}, "expected a `version`, such as '1'"),
        (
            {"alpha_bars": (1.0, 0.5)},
            "`alpha_bars` without `prepare`: the module would see no noise",
        ),
        (
            {"alpha_bars": (1.5,)},
            "`alpha_bars`: expected shares of variance from 0 to 1, one per timestep",
        ),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    """Contradictory arguments and unknown paths are refused before anything runs."""
    with pytest.raises(ConfigError, match=message):
        made(**changes)


def failing(pixels_BCHW: Tensor, noise_BCHW: Tensor, timestep: int) -> Tensor:
    raise RuntimeError("no such\nluck")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"taps": {"stride4": "first"}},
            r"tap stride4 at 'first': expected 4x6 values of a 16x24 view, got 8x12 \(6 "
            r"channels\); correct its stride",
        ),
        (
            {"taps": {"stride4": "level"}},
            r"tap stride4 at 'level': expected a tensor \(B, C, H, W\), got a tensor \[1, 8\]",
        ),
        (
            {"taps": {"stride4": ""}},
            r"tap stride4 at '': expected a tensor \(B, C, H, W\), got a tensor \[1, 8\]",
        ),
        (
            {"taps": {"stride4": "unused"}},
            r"tap stride4 at 'unused': expected a tensor .*, got no output: the module did not run",
        ),
        (
            {"prepare": failing},
            r"Pyramid: its dry run on a 16x24 view failed \(RuntimeError: no such luck\); check "
            r"that `prepare` returns",
        ),
    ],
)
def test_the_dry_run_finds_what_is_not_as_claimed(changes: dict[str, Any], message: str) -> None:
    """The dry run reports a wrong stride, an output that is no map, and code that fails."""
    with pytest.raises(TeacherError, match=message):
        prepared(made(**changes))


def test_a_plain_network_has_timestep_0_only_and_is_not_inverted() -> None:
    """A plain network has only timestep 0, and DDIM is refused."""
    with pytest.raises(
        ConfigError, match="`timestep` 150: this teacher has one timestep, 0; leave"
    ):
        prepared(made(), timestep=150)
    teacher = made(prepare=lambda x, noise, t: x, alpha_bars=[0.5] * 9)
    with pytest.raises(
        ConfigError, match="`encoding='ddim'`: a CallableTeacher makes its own inputs"
    ):
        prepare_teacher(
            teacher.loaded(),
            TeacherSettings(
                view=ViewSpec(height=16, width=24), timesteps=(8,), batch_size=2, ddim_steps=4
            ),
            resolve_compute("cpu", "fp32"),
        )


def test_hashes_cover_weights_taps_and_version() -> None:
    """Weights, taps and version each change a hash; memory layout and evaluation mode do not."""
    one = Pyramid()
    other = Pyramid()
    other.first.weight.data.add_(1e-6)
    first = made(module=one).loaded()
    assert (
        made(module=Pyramid().to(memory_format=torch.channels_last)).loaded().weights_sha256
        == first.weights_sha256
    )
    assert made(module=other).loaded().weights_sha256 != first.weights_sha256
    assert made(module=Pyramid().half()).loaded().weights_sha256 != first.weights_sha256
    configs = {
        made(**changes).loaded().config_sha256
        for changes in ({}, {"version": "2"}, {"taps": {"stride2": "first"}}, {"prepare": failing})
    }
    assert len(configs) == 4
    assert first.architecture == "Pyramid"


def test_nothing_stays_hooked() -> None:
    """After a pass, failed or not, the user's module has no hooks."""
    module = Pyramid()
    prepared(made(module=module))
    with pytest.raises(TeacherError, match="its dry run"):
        prepared(made(module=module, prepare=lambda x, noise, t: x[:, :2]))
    assert not any(part._forward_hooks for part in module.modules())


def test_a_map_that_the_next_module_overwrites_is_cached_as_it_was() -> None:
    """The output at a path is cached unchanged, even if an in-place ReLU follows."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
    net = torch.nn.Sequential(convolution, torch.nn.ReLU(inplace=True))
    teacher = prepared(CallableTeacher(net, taps={"stride1": "0"}, version="1"))
    (view,) = pixels(1)
    (found,) = teacher.features(batch_of(teacher, [view], ["a"], [False]))
    with torch.inference_mode():
        wanted = convolution(torch.from_numpy(view)[None].float() / 127.5 - 1)
    assert (wanted < 0).any()
    torch.testing.assert_close(found["t0/stride1"], wanted)
