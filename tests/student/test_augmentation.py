"""Random augmentation is a function of (seed, step, row) and agrees with torchvision."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF

from dtcache.errors import ConfigError
from dtcache.options import parse_scale
from dtcache.rng import sample_uniforms
from dtcache.student.augmentation import (
    Augmentation,
    crop_images,
    crop_maps,
    crop_masks,
    random_boxes,
)
from dtcache.student.color_jitter import jitter, turn_hue

ROWS = np.arange(5000)


@pytest.mark.parametrize("areas", [(0.08, 1.0), (0.3, 0.5), (0.9, 1.0), (1.0, 1.0)])
def test_boxes_lie_inside_and_have_the_areas_asked_for(areas: tuple[float, float]) -> None:
    """Boxes lie inside the view, with uniform areas between the bounds and aspects within 4/3."""
    left, top, right, bottom = random_boxes(sample_uniforms(0, 0, ROWS, 4), areas).T
    area = (right - left) * (bottom - top)
    aspect = (right - left) / (bottom - top)
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1 + 1e-12
    np.testing.assert_allclose(
        np.quantile(area, (0, 0.5, 1)), (areas[0], sum(areas) / 2, areas[1]), atol=0.02
    )
    assert aspect.min() >= 3 / 4 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9
    if areas[1] <= 0.5:
        assert aspect.min() < 0.77 and aspect.max() > 1.3
        assert abs(np.log(aspect).mean()) < 0.02


def test_the_whole_view_is_left_as_it_is() -> None:
    """A box of the full view returns the map bit for bit, and a box on pixel edges is a slice."""
    maps = torch.randn(2, 3, 6, 8)
    whole = torch.tensor([[0.0, 0, 1, 1]] * 2)
    part = torch.tensor([[0.25, 0.5, 0.75, 1.0]] * 2)
    assert torch.equal(crop_maps(maps, whole, (6, 8)), maps)
    torch.testing.assert_close(crop_maps(maps, part, (3, 4)), maps[:, :, 3:, 2:6])


def test_image_and_features_show_the_same_place() -> None:
    """An image and its features, cropped by one box, show the same part of the view."""
    box = (0.2, 0.35, 0.7, 0.8)
    for side in (64, 16):
        ramp = ((torch.arange(side) + 0.5) / side).expand(1, 1, side, side)
        cropped = crop_maps(ramp, torch.tensor([box]), (4, 4))[0, 0, 0]
        torch.testing.assert_close(
            cropped, box[0] + (torch.arange(4) + 0.5) / 4 * (box[2] - box[0])
        )


def test_shrunk_images_are_averaged() -> None:
    """A checkerboard shrunk to a third of its size is averaged to grey."""
    image = ((torch.arange(24)[:, None] + torch.arange(24)) % 2 * 255).expand(1, 3, 24, 24)
    shown = crop_images(image.to(torch.uint8), torch.tensor([[0.0, 0, 1, 1]]), (8, 8))
    assert shown.shape == (1, 3, 8, 8)
    assert float((shown - 127.5).abs().max()) < 20


def test_without_options_nothing_is_touched() -> None:
    """Without crop and jitter, the input tensors themselves are returned."""
    augmentation = Augmentation(scale=None, color_jitter=0.0, seed=0)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    maps = {"a": torch.zeros(2, 3, 2, 2)}
    assert augmentation.images(images, 0, ROWS[:2], (8, 8)) is images
    assert augmentation.features(maps, 0, ROWS[:2]) is maps


def test_views_are_a_function_of_seed_step_and_row() -> None:
    """An augmented view depends only on seed, step and row; its crop does not depend on jitter."""
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).repeat(3, 1, 1, 1)
    augmentation = Augmentation(scale="0.3,1.0", color_jitter=1.0, seed=5)
    shown = augmentation.images(images, 7, np.array([4, 9, 2]), (16, 16))
    assert torch.equal(augmentation.images(images[:1], 7, np.array([9]), (16, 16)), shown[1:2])
    others = [augmentation.images(images[:1], 8, np.array([9]), (16, 16)), shown[:1], shown[2:]]
    others.append(
        Augmentation(scale="0.3,1.0", color_jitter=1.0, seed=6).images(
            images[:1], 7, np.array([9]), (16, 16)
        )
    )
    assert not any(torch.equal(other, shown[1:2]) for other in others)
    assert torch.equal(
        Augmentation(scale="0.3,1.0", color_jitter=0.0, seed=5).boxes(7, ROWS),
        augmentation.boxes(7, ROWS),
    )


def test_masks_are_cropped_with_their_images() -> None:
    """Masks are cropped with the same boxes as their images."""
    masks = torch.randint(
        0, 9, (2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])
    found = crop_masks(masks, boxes)
    assert np.array_equal(found[0], np.kron(masks[0, 4:, 2:6], np.ones((2, 2), np.uint8)))
    assert torch.equal(found[1], masks[1]) and found.dtype == torch.uint8

    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    large = torch.stack([(y * 3 // 48 + x * 4 // 64 + i) % 3 for i in range(20)])
    augmentation = Augmentation(scale="0.25,1.0", color_jitter=0, seed=3)
    rows = ROWS[:20]
    planes = torch.nn.functional.one_hot(large, 3).permute(0, 3, 1, 2).float()
    shown = augmentation.images(planes, 7, rows, (48, 64)).argmax(1)
    cropped = augmentation.masks(large, 7, rows)
    assert (cropped == shown).float().mean() > 0.97 > (large == shown).float().mean()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_jitter_is_torchvisions_an_image_at_a_time(strength: float) -> None:
    """Batched jitter equals torchvision's colour operations applied per image in sequence."""
    images = torch.rand(6, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    uniforms[:, 0] = torch.tensor([0.1, 0.2, 0.79, 0.81, 0.3, 0.4])
    uniforms[:, 5] = torch.tensor([0.5, 0.19, 0.21, 0.9, 0.1, 0.6])
    found = jitter(images, uniforms, strength)
    for image, (whether, b, c, s, hue, grey), got in zip(
        images, uniforms.tolist(), found, strict=True
    ):
        if whether < 0.8:
            factors = [max(0.0, 1 + 0.8 * strength * (2 * u - 1)) for u in (b, c, s)]
            adjustments = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
            for adjust, factor in zip(adjustments, factors, strict=True):
                image = adjust(image, factor)
            image = TF.adjust_hue(image, 0.2 * strength * (2 * hue - 1))
        if grey < 0.2:
            image = TF.rgb_to_grayscale(image, 3)
        torch.testing.assert_close(got, image, atol=1e-4, rtol=0)


def test_hue_turns_by_the_circle() -> None:
    """A third of the hue circle turns red to green; a full turn and grey pixels change nothing."""
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        turn_hue(red, torch.tensor(1 / 3)).ravel(), torch.tensor([0.0, 1, 0])
    )
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(turn_hue(images, torch.tensor(1.0)), images, atol=1e-5, rtol=0)
    grey = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    assert torch.equal(turn_hue(grey, torch.tensor(0.3)), grey)


@pytest.mark.parametrize(
    "text", ["", "0.3", "0,1", "0.5,0.3", "0.3,1.1", "a,b", "0.3,1,1", "nan,1"]
)
def test_other_areas_are_refused(text: str) -> None:
    """Areas that are not two rising shares, and a strength out of bounds, are refused by name."""
    assert parse_scale(" 0.3, 1") == (0.3, 1.0)
    with pytest.raises(ConfigError, match=r"`scale` .*: expected two rising shares of the area"):
        parse_scale(text)
    for strength in (-0.1, 2.5, math.nan):
        with pytest.raises(
            ConfigError, match=r"`color_jitter` .*: expected a strength from 0 \(none\) to 2"
        ):
            Augmentation(scale=None, color_jitter=strength, seed=0)
