"""Images, masks and predictions side by side, as a PNG."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

CELL = 128
"""Pixels of the longer side of one picture."""
GAP = 4
IGNORED = np.uint8(255)


def label_picture(
    images: Sequence[NDArray[np.uint8]] | None,
    masks: Sequence[NDArray[np.uint8]],
    predicted: Sequence[NDArray[np.uint8]],
    classes: int,
    ignore: int,
) -> bytes:
    """Return a PNG of a row an image: the image (3, H, W) where there is one, its mask (H, W), the prediction (H, W).

    Class 0 is black, the others have colours of their own, and pixels to ignore are white.
    """
    palette = np.zeros((256, 3), np.uint8)
    palette[1:classes] = (
        255 * colormaps["hsv"](np.linspace(0, 1, max(1, classes - 1), endpoint=False))[:, :3]
    )
    columns = [[x.transpose(1, 2, 0) for x in images]] if images is not None else []
    truths = [np.where((mask == ignore)[..., None], IGNORED, palette[mask]) for mask in masks]
    columns += [truths, [palette[mask] for mask in predicted]]
    height, width = masks[0].shape
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    sheet = Image.new(
        "RGB",
        (len(columns) * (size[0] + GAP) - GAP, len(masks) * (size[1] + GAP) - GAP),
        (128, 128, 128),
    )
    for place, column in enumerate(columns):
        for row, cell in enumerate(column):
            shown = Image.fromarray(cell).resize(size, Image.Resampling.NEAREST)
            sheet.paste(shown, (place * (size[0] + GAP), row * (size[1] + GAP)))
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()
