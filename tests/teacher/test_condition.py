"""The condition of a teacher: its choice, its refusals and its effect on the network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from teacher.batches import batch_of
from teacher.kinds import hooked_unet, save_class_unet
from teacher.test_autoencoder import CPU, PIXELS, noisy, pixels

from dtcache.errors import ConfigError, ImagesError
from dtcache.recipe import ConditionSpec, ViewSpec
from dtcache.teacher import Prompt, TeacherSettings, load_teacher, prepare_teacher
from dtcache.teacher.condition import choose_condition, require_labels
from dtcache.teacher.unet import UNetDenoiser


class Fake:
    """The attributes of a denoiser that its condition depends on."""

    def __init__(self, num_classes: int | None, null_class: int | None) -> None:
        self.num_classes = num_classes
        self.null_class = null_class


PROMPT = Prompt(text="a cat", embedding_LD=np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("denoiser", "prompt", "asked", "chosen"),
    [
        (Fake(None, None), None, None, None),
        (Fake(10, 10), None, None, ConditionSpec(kind="null")),
        (Fake(10, 10), None, "null", ConditionSpec(kind="null")),
        (Fake(10, None), None, "label", ConditionSpec(kind="label")),
        (Fake(10, None), None, "9", ConditionSpec(kind="class", number=9)),
        (
            Fake(None, None),
            PROMPT,
            None,
            ConditionSpec(kind="prompt", prompt="a cat", embedding_sha256=PROMPT.sha256),
        ),
    ],
)
def test_conditions(
    denoiser: Fake, prompt: Prompt | None, asked: str | None, chosen: ConditionSpec | None
) -> None:
    """The condition is null by default if it exists, else the requested one or the prompt."""
    assert choose_condition(denoiser, prompt, asked) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("denoiser", "prompt", "asked", "message"),
    [
        (
            Fake(None, None),
            None,
            "label",
            "`condition` label: this teacher is not class-conditional; leave",
        ),
        (
            Fake(None, None),
            PROMPT,
            "null",
            "`condition` null: this teacher is conditioned on text; pass `prompt`",
        ),
        (
            Fake(10, None),
            None,
            None,
            "conditioned on one of 10 classes; pass `condition='label'` .* 0 to 9",
        ),
        (
            Fake(10, None),
            None,
            "null",
            "configuration has 10 classes and does not say whether one of them is a null class",
        ),
        (
            Fake(10, 10),
            None,
            "10",
            "`condition` 10: expected label, null or a class number from 0 to 9",
        ),
        (
            Fake(10, 10),
            None,
            "cat",
            "`condition` cat: expected label, null or a class number from 0 to 9",
        ),
        (Fake(10, 10), None, "-1", "`condition` -1: expected label, null or a class number"),
        (Fake(10, 10), None, "²", "`condition` ²: expected label, null or a class number"),
    ],
)
def test_impossible_conditions_are_refused(
    denoiser: Fake, prompt: Prompt | None, asked: str, message: str
) -> None:
    """An impossible condition is refused with a reason and a remedy."""
    with pytest.raises(ConfigError, match=message):
        choose_condition(denoiser, prompt, asked)  # type: ignore[arg-type]


def test_labels_outside_the_teachers_classes_are_refused() -> None:
    """A missing or too large label is refused with its first image."""
    require_labels(["a", "b"], [0, 2], 3)
    with pytest.raises(
        ConfigError, match="`condition='label'`: the images have no labels; pass a folder with"
    ):
        require_labels(["a"], None, 3)
    for label in (None, 3, -1):
        with pytest.raises(
            ImagesError,
            match=rf"image b: expected a label from 0 to 2, the teacher's classes, got {label}",
        ):
            require_labels(["a", "b"], [0, label], 3)


@pytest.mark.parametrize(("condition", "told"), [("label", [7, 2]), ("5", [5, 5])])
def test_a_class_conditional_unet_is_told_its_class(
    tmp_path: Path, condition: str, told: list[int]
) -> None:
    """Taps equal hooks on the full model in memory with the same classes."""
    unet = save_class_unet(tmp_path)
    teacher = prepare_teacher(
        load_teacher(str(tmp_path)),
        TeacherSettings(
            view=ViewSpec(height=32, width=32), timesteps=(50,), batch_size=3, condition=condition
        ),
        CPU,
    )
    batch = batch_of(
        teacher, list(PIXELS), ["a", "b"], [False, True], seed=3, draws=[0], labels=[7, 2]
    )
    (found,) = teacher.features(batch)
    x_BCHW = noisy(pixels(), torch.linspace(1e-4, 0.02, 1000), 50)
    wanted = hooked_unet(
        unet, (4, 2, 1), x_BCHW, torch.tensor([50, 50]), class_labels=torch.tensor(told)
    )
    for name, maps in found.items():
        torch.testing.assert_close(maps, wanted[name.removeprefix("t50/")], rtol=1e-4, atol=1e-4)


def test_a_unet_does_not_say_whether_it_has_a_null_class(tmp_path: Path) -> None:
    """Null is never the default for a U-Net, since num_class_embeds does not tell if it exists."""
    denoiser = UNetDenoiser(save_class_unet(tmp_path))
    assert (denoiser.num_classes, denoiser.null_class) == (8, None)
