"""Compare image formats for stored views: bytes, coding time and PSNR, on resized photographs.

    python benchmarks/stored_images.py --images ../shared/data/camvid/images/train \
        [--count 64] [--size 256] [--results DIR]

If the view changes no pixel, a cache keeps the source's bytes and needs no format. Lossless WebP is
named by its method and its quality; both set the effort of encoding. Times are CPU times of one
thread. Decoding times are medians over rounds in which every format decodes every image once.

Results: docs/results/stored_images-SIZE.json.
"""

import argparse
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from records import results_flag, write

from dtcache.images import load_views, open_source
from dtcache.options import parse_size
from dtcache.recipe import ViewSpec
from dtcache.rng import permuted

FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "optimize": True},
    **{
        f"WebP, {method}/{quality}": {
            "format": "WEBP",
            "lossless": True,
            "method": method,
            "quality": quality,
        }
        for method, quality in ((4, 60), (4, 20), (3, 20), (2, 20), (1, 20), (0, 20))
    },
    "JPEG 95, 4:4:4": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "JPEG 90, 4:2:0": {"format": "JPEG", "quality": 90, "subsampling": 2},
    "WebP 95": {"format": "WEBP", "quality": 95, "method": 4},
}
ROUNDS = 7
"""Rounds of decoding."""


def main() -> None:
    """Measure or read the result, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--count", type=int, default=64, help="number of images [64]")
    parser.add_argument("--size", default="256", metavar="H[xW]", help="size of the view [256]")
    results_flag(parser)
    args = parser.parse_args()
    command = f"python benchmarks/stored_images.py --images IMAGES --count {args.count} "
    command += f"--size {args.size}"
    started = time.time()
    result = measure(args.images, args.count, args.size)
    path = args.results / f"stored_images-{args.size}.json"
    write(path, command, result, time.time() - started)
    print(
        f"{'format':16} {'bytes':>8} {'/ PNG':>7} {'decode ms':>9} {'encode ms':>9} {'PSNR dB':>8}"
    )
    png = result["formats"]["PNG"]["bytes"]
    for name, row in result["formats"].items():
        psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.1f}"
        times = f"{row['decode_ms']:9.2f} {row['encode_ms']:9.2f}"
        print(f"{name:16} {row['bytes']:8.0f} {row['bytes'] / png:7.2f} {times} {psnr:>8}")


def measure(images: Path, count: int, size: str) -> dict[str, Any]:
    """Return the bytes and milliseconds per image, and the PSNR, of each format."""
    source = open_source(images)
    height, width = parse_size(size)
    view = ViewSpec(height=height, width=width)
    rows = permuted(len(source.keys), seed=0, stream="stored-images")[:count]
    loaded = [
        v.pixels_CHW
        for v in load_views(source, rows.tolist(), view, threads=1)
        if v.pixels_CHW is not None
    ]
    views = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in loaded]
    encoded: dict[str, list[bytes]] = {}
    encode_ms = {}
    for name, options in FORMATS.items():
        started = time.process_time()
        encoded[name] = [encode(view, options) for view in views]
        encode_ms[name] = 1000 * (time.process_time() - started) / len(views)
    times: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(ROUNDS):
        for name, files in encoded.items():
            started = time.process_time()
            for data in files:
                decode(data)
            times[name].append(1000 * (time.process_time() - started) / len(files))
    return {
        "images": len(views),
        "formats": {
            name: {
                "bytes": statistics.mean(map(len, files)),
                "decode_ms": statistics.median(times[name]),
                "encode_ms": encode_ms[name],
                "psnr": psnr(views, files),
            }
            for name, files in encoded.items()
        },
    }


def encode(view: Image.Image, options: dict[str, Any]) -> bytes:
    """Return an image encoded with Pillow's options."""
    sink = io.BytesIO()
    view.save(sink, **options)
    return sink.getvalue()


def decode(data: bytes) -> np.ndarray:
    """Return the RGB pixels (H, W, 3), uint8, of an encoded image."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def psnr(views: list[Image.Image], files: list[bytes]) -> float | None:
    """Return the peak signal-to-noise ratio over all images in dB; None if no pixel changes."""
    pairs = zip(views, files, strict=True)
    error = statistics.mean(
        float(np.square(np.asarray(v, np.float64) - decode(f)).mean()) for v, f in pairs
    )
    return None if error == 0 else float(10 * np.log10(255**2 / error))


if __name__ == "__main__":
    main()
