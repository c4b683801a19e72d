"""Images, masks and predictions side by side, as a PNG."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

CELL = 128
"""Pixels of the longer side of one cell."""
GAP = 4
IGNORED = np.uint8(255)
BACKGROUND = (128, 128, 128)


def label_picture(
    images: Sequence[NDArray[np.uint8]] | None,
    masks: Sequence[NDArray[np.uint8]],
    predicted: Sequence[NDArray[np.uint8]],
    classes: int,
    ignore: int,
) -> bytes:
    """Return a PNG with one row per image: image, mask and prediction.

    Images are (3, H, W), masks and predictions (H, W). Without `images` there are two columns.
    Class 0 is black, every other class has a colour of its own, and ignored pixels are white.
    """
    palette = np.zeros((256, 3), np.uint8)
    hues = np.linspace(0, 1, max(1, classes - 1), endpoint=False)
    palette[1:classes] = (255 * colormaps["hsv"](hues))[:, :3]
    columns = [[x.transpose(1, 2, 0) for x in images]] if images is not None else []
    truths = [np.where((mask == ignore)[..., None], IGNORED, palette[mask]) for mask in masks]
    columns += [truths, [palette[mask] for mask in predicted]]
    height, width = masks[0].shape
    scale = CELL / max(height, width)
    cell_width = max(1, round(width * scale))
    cell_height = max(1, round(height * scale))
    sheet_size = (
        len(columns) * (cell_width + GAP) - GAP,
        len(masks) * (cell_height + GAP) - GAP,
    )
    sheet = Image.new("RGB", sheet_size, BACKGROUND)
    for column_number, column in enumerate(columns):
        for row, pixels in enumerate(column):
            cell = Image.fromarray(pixels).resize(
                (cell_width, cell_height), Image.Resampling.NEAREST
            )
            sheet.paste(cell, (column_number * (cell_width + GAP), row * (cell_height + GAP)))
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()
