"""Scenes: generated colour images with a class, a segmentation mask and boxes.

A scene shows one main object in front of up to two small ones of other classes. All are textured,
lit and cast shadows on a varied background. The class is the shape of the main object alone:
colour, texture, light, position, scale, rotation and background are drawn independently of it. No
random draw depends on the size, so a scene is the same at every size. Pixels are painted with basic
arithmetic and square roots only, so every machine rounds them the same way.
"""

import colorsys
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtcache.errors import ConfigError

_Floats = NDArray[np.floating]
VERSION = 1
"""Version of the generator. Increase it whenever a pixel changes: written sets are then refused."""
_MIN_SIZE = 16
_REACH = 2.4
"""Maximum extent of a shape from its centre, in scales, including stretch and shadow."""
_OBJECT_TEXTURES = ("gradient", "stripes", "checks", "dots", "noise")
_BACKGROUND_TEXTURES = ("gradient", "stripes", "noise", "horizon")


def _length(x: _Floats, y: _Floats) -> _Floats:
    return np.asarray(np.sqrt(x * x + y * y))


def _star(x: _Floats, y: _Floats) -> _Floats:
    # Fold at the axes of the tips until one half tip is left; its straight edge bounds the star.
    x = np.abs(x)
    y = -y
    for mirror in (0.809, -0.809):
        over = 2 * np.maximum(mirror * x - 0.588 * y, 0)
        x = x - over * mirror
        y = y + over * 0.588
    return np.asarray(0.728 * np.abs(x) + 0.588 * (y - 1.28))


# Signed distances to an outline, negative inside, with y pointing down. Each shape has about the
# area of the unit disc, so that size does not reveal the class. The order is alphabetical, so that
# labels equal those of a folder tree.
_SHAPES: dict[str, Callable[[_Floats, _Floats], _Floats]] = {
    "crescent": lambda x, y: np.maximum(_length(x - 0.15, y) - 1.33, 1.05 - _length(x - 0.93, y)),
    "cross": lambda x, y: np.maximum(
        np.maximum(abs(x), abs(y)) - 1.19, np.minimum(abs(x), abs(y)) - 0.4
    ),
    "disc": lambda x, y: _length(x, y) - 1,
    "heart": lambda x, y: (
        np.minimum(0.707 * (abs(x) + abs(y - 0.1)), _length(abs(x) - 0.467, y + 0.367)) - 0.66
    ),
    "ring": lambda x, y: abs(_length(x, y) - 0.83) - 0.3,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.886,
    "star": _star,
    "triangle": lambda x, y: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.777,
}
CLASSES: tuple[str, ...] = tuple(_SHAPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One image with its complete annotation.

    pixels: uint8 [H, W, 3], RGB. label: the main object's class, an index into CLASSES. mask: uint8
    [H, W], 0 for background, else 1 + the class of the front-most object. boxes: int32 [n, 4], x0
    y0 x1 y1 in pixels (x1, y1 exclusive), around the visible part of each visible object, back to
    front, so the main object is last. box_labels: int32 [n], the classes of the boxes.
    """

    pixels: NDArray[np.uint8]
    label: int
    mask: NDArray[np.uint8]
    boxes: NDArray[np.int32]
    box_labels: NDArray[np.int32]


def scene(seed: int, index: int, size: int = 64) -> Scene:
    """Return scene `index` of stream `seed` at size x size pixels: a pure function of the three.

    The same seed and index give the same layout at every size. Raises ConfigError if `size` is
    under 16.
    """
    require_scene_size(size)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:16], "little")
    rng = np.random.Generator(np.random.Philox(key=key))
    # The small objects have distinct other classes and under 0.2 of the main object's area each, so
    # the mask's largest class is always the label.
    labels = rng.permutation(len(CLASSES)).astype(np.int32)[: 1 + rng.integers(3)]
    ticks = ((np.arange(2 * size) + 0.5) / (2 * size)).astype(np.float32)
    background = _draw_colours(rng)
    canvas = _texture(
        rng, _BACKGROUND_TEXTURES, (0.3, 1.5), background, ticks[None, :], ticks[:, None]
    )
    owner = np.full((size, size), -1)
    light = rng.uniform(0, 2 * math.pi)
    shadow = rng.uniform(0.15, 0.6)
    for number, (x, y, scale) in enumerate(_draw_places(rng, len(labels))):
        reach = _REACH * scale  # painting only this region makes scenes cheap
        columns, rows = (
            slice(max(0, int((at - reach) * size)), int((at + reach) * size) + 1) for at in (x, y)
        )
        across, down = (slice(2 * pixels.start, 2 * pixels.stop) for pixels in (columns, rows))
        local = (ticks[None, across] - x) / scale, (ticks[down, None] - y) / scale
        # An object coloured like its background would have no visible outline, so take the most
        # distant of 16 colours.
        choices = [_draw_colours(rng) for _ in range(16)]
        colours = max(
            choices, key=lambda pair: float(abs(pair - background.mean(axis=0)).sum(axis=1).min())
        )
        alpha = _paint_object(
            rng, canvas[:, down, across], CLASSES[labels[number]], colours, light, shadow, *local
        )
        owner[rows, columns][_shrink(alpha) >= 0.5] = number
    visible = np.unique(owner[owner >= 0])
    return Scene(
        pixels=np.ascontiguousarray(
            (_shrink(canvas) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
        ),
        label=int(labels[-1]),
        mask=np.where(owner < 0, 0, 1 + labels[owner]).astype(np.uint8),
        boxes=np.array(
            [Image.fromarray(owner == number).getbbox() for number in visible], np.int32
        ),
        box_labels=labels[visible],
    )


def require_scene_size(size: int) -> None:
    """Raise ConfigError if scenes of `size` pixels would be too small to show their objects."""
    if size < _MIN_SIZE:
        raise ConfigError(f"scene size: expected at least {_MIN_SIZE} pixels, got {size}")


def _shrink(planes: _Floats) -> _Floats:
    rows = planes[..., ::2, :] + planes[..., 1::2, :]
    return np.asarray((rows[..., ::2] + rows[..., 1::2]) / 4)


def _draw_places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Draw x, y and scale of each object, the main object last, in fractions of the image.

    The scale is the radius of the disc of the object's area.
    """
    x = rng.uniform(0.46, 0.54)
    y = rng.uniform(0.46, 0.54)
    scale = rng.uniform(0.25, 0.31)
    places = [(x, y, scale)]
    for _ in range(count - 1):
        angle = rng.uniform(0, 2 * math.pi)
        distance = scale * rng.uniform(1.5, 2.3)
        beside = np.clip(
            (x + distance * math.cos(angle), y + distance * math.sin(angle)), 0.06, 0.94
        ).tolist()
        places.insert(0, (*beside, scale * rng.uniform(0.2, 0.35)))
    return places


def _draw_colours(rng: np.random.Generator) -> _Floats:
    """Draw two similar colours, [2, 3] in 0..1.

    Strong textures would hide shapes from small diffusion models.
    """
    hue = rng.random()
    saturation = rng.uniform(0.1, 0.8)
    value = rng.uniform(0.25, 1.0)
    other_value = value + rng.uniform(0.05, 0.14) * (1 if value < 0.6 else -1)
    other = colorsys.hsv_to_rgb(
        (hue + rng.normal(0, 0.05)) % 1, saturation * rng.uniform(0.78, 1.05), other_value
    )
    return np.array([colorsys.hsv_to_rgb(hue, saturation, value), other], np.float32)


def _paint_object(
    rng: np.random.Generator,
    canvas: _Floats,
    shape: str,
    colours: _Floats,
    light: float,
    shadow: float,
    across: _Floats,
    down: _Floats,
) -> _Floats:
    """Paint on canvas [3, H, W] and return the object's coverage, [H, W] in 0..1.

    `across` and `down` are coordinates in scales.
    """
    turn = rng.uniform(-0.2, 0.2)
    stretch = math.exp(rng.uniform(-0.13, 0.13))
    gloss = rng.uniform(-0.2, 0.55)
    # The texture's 0 to 1 spans about -2 to 2 scales of the object.
    colour = _texture(rng, _OBJECT_TEXTURES, (1.0, 4.0), colours, 0.5 + across / 4, 0.5 + down / 4)
    light_x = math.cos(light)
    light_y = math.sin(light)
    cos = math.cos(turn)
    sin = math.sin(turn)
    # The second of the two outlines belongs to the shadow.
    inside, far = (
        -_SHAPES[shape]((x * cos + y * sin) / stretch, (y * cos - x * sin) * stretch)
        for x, y in ((across, down), (across + 0.22 * light_x, down + 0.22 * light_y))
    )
    canvas *= 1 - shadow * np.clip(0.5 + 2.5 * far, 0, 1)
    alpha = np.clip(0.5 + inside / (across[0, 1] - across[0, 0]), 0, 1)
    rim = np.clip(1 - inside * 4, 0, 1)
    shade = (1 + 0.2 * (across * light_x + down * light_y)) * (1 - 0.4 * rim * rim)
    spot = np.clip(1 - 2 * ((across - 0.5 * light_x) ** 2 + (down - 0.5 * light_y) ** 2), 0, 1)
    canvas += alpha * (np.clip(colour * shade + max(0.0, gloss) * spot * spot, 0, 1) - canvas)
    return np.asarray(alpha)


def _texture(
    rng: np.random.Generator,
    kinds: tuple[str, ...],
    frequencies: tuple[float, float],
    colours: _Floats,
    x: _Floats,
    y: _Floats,
) -> _Floats:
    """Mix two colours by a random pattern into [3, H, W].

    The columns x [1, W] and rows y [H, 1] run over about 0..1.
    """
    kind = kinds[rng.integers(len(kinds))]
    frequency = rng.uniform(*frequencies)
    phase = rng.random()
    angle = rng.uniform(0, 2 * math.pi)
    cos = math.cos(angle)
    sin = math.sin(angle)
    along = (x - 0.5) * cos + (y - 0.5) * sin
    sideways = (y - 0.5) * cos - (x - 0.5) * sin
    periods = along * frequency + phase, sideways * frequency
    u, v = (np.abs(t - np.floor(t) - 0.5) * 4 - 1 for t in periods)  # triangle waves in -1..1
    below = y - 0.35 - 0.3 * phase + 0.25 * cos * (x - 0.5)
    match kind:
        case "gradient":
            mix: _Floats = 0.5 + along * (0.5 + 0.2 * frequency)
        case "stripes":
            mix = 0.5 + u * 2
        case "checks":
            mix = 0.5 + u * v * 6
        case "dots":
            mix = 2.5 - 2.5 * ((u - 1) ** 2 + (v - 1) ** 2)
        case "horizon":
            mix = np.clip(below * 40, 0, 1) * (1 - below)
        case _:
            coarse, middle, fine = (_noise(rng, cells, x, y) for cells in (3, 6, 12))
            mix = 0.57 * coarse + 0.29 * middle + 0.14 * fine
    first, second = colours[:, :, None, None]
    return np.asarray(first + np.clip(mix, 0, 1) * (second - first))


def _noise(rng: np.random.Generator, cells: int, x: _Floats, y: _Floats) -> _Floats:
    """Return value noise, [H, W] in 0..1.

    Random knots over 0..1 are blended smoothly along one axis after the other.
    """
    values: _Floats = rng.random((cells + 1, cells + 1), dtype=np.float32)
    for ticks in (y, x):
        position = np.clip(ticks.ravel()[:, None], 0, 0.999) * cells
        knot = position.astype(np.intp)
        offset = (position - knot).astype(np.float32)
        low = values[knot[:, 0]]
        high = values[knot[:, 0] + 1]
        values = (low + offset * offset * (3 - 2 * offset) * (high - low)).T
    return values
