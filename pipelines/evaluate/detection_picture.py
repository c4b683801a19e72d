"""Objects and detections side by side, as a PNG."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from dtcache.names import shown

CELL = 256
"""Pixels of the longer side of one cell."""
GAP = 4
LEAST_SCORE = 0.5
"""Detections of a lower score are not drawn."""
OPACITY = 0.45
MOST_LETTERS = 24
GREY = (128, 128, 128)


def detection_picture(
    images: Sequence[Tensor],
    truth: Sequence[dict[str, Tensor]],
    predicted: Sequence[dict[str, Tensor]],
    classes: Sequence[str],
) -> bytes:
    """Return a PNG with one row per image: its objects, and the detections of at least 0.5.

    Images are (3, H, W) in [0, 1]. Objects and detections have `boxes` (N, 4), `labels` (N,) from
    1, and may have `masks` (N, H, W) and `scores` (N,). Each class has a colour.
    """
    hues = colormaps["hsv"](np.linspace(0, 1, len(classes), endpoint=False))
    colours = [tuple(int(255 * value) for value in hue[:3]) for hue in hues]
    height, width = images[0].shape[1:]
    scale = CELL / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    size = (2 * (cell[0] + GAP) - GAP, len(images) * (cell[1] + GAP) - GAP)
    sheet = Image.new("RGB", size, GREY)
    for row, (image_CHW, *columns) in enumerate(zip(images, truth, predicted, strict=True)):
        for column, objects in enumerate(columns):
            drawn = _drawn(image_CHW, objects, cell, classes, colours)
            sheet.paste(drawn, (column * (cell[0] + GAP), row * (cell[1] + GAP)))
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _drawn(
    image_CHW: Tensor,
    objects: dict[str, Tensor],
    cell: tuple[int, int],
    classes: Sequence[str],
    colours: Sequence[tuple[int, ...]],
) -> Image.Image:
    """Return an image with its objects, enlarged to a cell (width, height)."""
    scores_N = objects.get("scores", torch.ones(len(objects["boxes"])))
    kept = torch.nonzero(scores_N >= LEAST_SCORE).flatten().tolist()
    pixels_HWC = (255 * image_CHW).round().byte().permute(1, 2, 0).numpy().astype(float)
    labels = (objects["labels"] - 1).tolist()
    for number in kept if "masks" in objects else ():
        mask_HW = objects["masks"][number].bool().numpy()
        colour = np.array(colours[labels[number]], float)
        pixels_HWC[mask_HW] = (1 - OPACITY) * pixels_HWC[mask_HW] + OPACITY * colour
    picture = Image.fromarray(pixels_HWC.astype(np.uint8)).resize(cell, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    scale = cell[0] / image_CHW.shape[2]
    for number in kept:
        x0, y0, x1, y1 = (scale * objects["boxes"][number]).tolist()
        colour_rgb = colours[labels[number]]
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour_rgb, width=2)
        score = f" {scores_N[number]:.2f}" if "scores" in objects else ""
        text = shown(classes[labels[number]])[:MOST_LETTERS] + score
        draw.text((x0 + 3, y0 + 2), text, fill="white", stroke_width=1, stroke_fill="black")
    return picture
