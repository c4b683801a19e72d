"""Maps as pictures: principal components as colours, K-means segments, PNG and WebP data URIs.

All images of an array share one basis and one clustering, so that a colour means the same in each.
Shape suffixes: N images, C channels, H rows, W columns, M positions.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

SPREAD = 2.0
"""Standard deviations from grey to the end of a component's colour range."""
SEGMENTS = 6
MOST_POSITIONS = 20_000
"""Most positions that clusters are fitted on."""
MOST_SIDE = 64
"""Larger maps are averaged down to this many pixels per side."""
PHOTO_SIDE = 160
PALETTE = np.array(
    [(78, 121, 167), (242, 142, 43), (89, 161, 79), (225, 87, 89), (176, 122, 161), (237, 201, 72)],
    np.uint8,
)

Maps = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourBasis:
    """Three principal components of an array's channels."""

    mean_C: NDArray[np.float64]
    axes_C3: NDArray[np.float64]
    """Unit columns by falling variance; the entry with the largest magnitude is positive."""
    std_3: NDArray[np.float64]

    def colours(self, map_CHW: Maps) -> NDArray[np.uint8]:
        """Return a map as (H, W, 3) RGB, uint8."""
        flat_MC = map_CHW.reshape(len(self.mean_C), -1).T - self.mean_C
        scaled = flat_MC @ self.axes_C3 / (2 * SPREAD * self.std_3) + 0.5
        rgb = np.zeros((len(scaled), 3))
        rgb[:, : scaled.shape[1]] = scaled
        return (rgb.clip(0, 1) * 255).round().astype(np.uint8).reshape(*map_CHW.shape[1:], 3)


def colour_basis(maps_NCHW: Maps) -> ColourBasis:
    """Fit the basis on the maps of several images."""
    flat = maps_NCHW.transpose(1, 0, 2, 3).reshape(maps_NCHW.shape[1], -1).astype(np.float64)
    mean_C = flat.mean(1)
    variance, axes = np.linalg.eigh(
        np.cov(flat) if flat.shape[0] > 1 else np.atleast_2d(flat.var())
    )
    axes = axes[:, ::-1][:, :3]
    variance = variance[::-1][:3]
    signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return ColourBasis(mean_C=mean_C, axes_C3=axes * signs, std_3=np.sqrt(variance.clip(1e-12)))


def segments(maps_NCHW: Maps) -> NDArray[np.int64]:
    """Return the K-means cluster of each position, (N, H, W); all images share the clusters."""
    from sklearn.cluster import KMeans

    count, channels, height, width = maps_NCHW.shape
    flat_MC = np.ascontiguousarray(maps_NCHW.transpose(0, 2, 3, 1).reshape(-1, channels))
    fitted = flat_MC[np.random.default_rng(0).permutation(len(flat_MC))[:MOST_POSITIONS]]
    clusters = min(SEGMENTS, len(np.unique(fitted, axis=0)))
    with threadpool_limits(1):
        model = KMeans(clusters, n_init=4, random_state=0).fit(fitted)
        labels: NDArray[np.int32] = model.predict(flat_MC)
    # The largest cluster comes first, so that colours depend less on the random start.
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    return np.argsort(order)[labels].reshape(count, height, width).astype(np.int64)


def map_uri(rgb_HW3: NDArray[np.uint8]) -> str:
    """Return a map as the data URI of a PNG, one pixel per position."""
    image = Image.fromarray(rgb_HW3)
    if max(image.size) > MOST_SIDE:
        image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.BOX)
    return _uri(image, "PNG", optimize=True)


def photo_uri(pixels_CHW: NDArray[np.uint8]) -> str:
    """Return an image as the data URI of a WebP, at most 160 pixels per side."""
    image = Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    return _uri(image, "WEBP", quality=88)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(sink.getvalue()).decode()}"
