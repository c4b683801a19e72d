"""Measure the attention loss (AT) between decoded and exact features and between noise draws.

    python benchmarks/attention_error.py --caches runs/bytes/caches \
        --images cifar10-test.parquet --teacher DIR \
        --timestep T [--count 256] [--results DIR]

The script encodes and decodes uncompressed features with the codecs of the caches of a sweep,
benchmarks/sweeps/bytes.toml, and prints AT(decoded, exact) per tap. No codec was fitted on these
images. AT(draw 0, draw 1), between two noise draws of the same image, is the reference. The last
columns are for a log-energy map rounded to a number of decibels, which a cache could store beside
the payload: its AT from the exact map, and its entropy in bytes per image.

Results: docs/results/attention_error.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from records import results_flag, write

from dtcache.cache.cache import Cache
from dtcache.codec import FeatureDecoder
from dtcache.codec.pca_dct import Encoder
from dtcache.losses.features import at_loss, attention_map
from dtcache.options import ExtractOptions
from dtcache.whitening import unwhiten
from pipelines.extract.extract import extract

ARMS = {"10x": "high", "50x": "default", "100x": "small"}
"""Cache of the sweep by its ratio to fp16."""
STEPS_DB = (3.0, 1.0, 0.5)
"""Resolutions of the log-energy maps, in decibels of energy."""


def main() -> None:
    """Measure, print the table, and record the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", type=Path, required=True, help="folder of the sweep's caches")
    parser.add_argument(
        "--images", type=Path, required=True, help="images that no codec was fitted on"
    )
    parser.add_argument("--teacher", required=True, help="teacher of the caches")
    parser.add_argument("--timestep", type=int, required=True, help="timestep of the caches")
    parser.add_argument("--count", type=int, default=256, help="number of images [256]")
    results_flag(parser)
    args = parser.parse_args()
    command = (
        "python benchmarks/attention_error.py --caches CACHES --images IMAGES --teacher TEACHER "
        f"--timestep {args.timestep} --count {args.count}"
    )
    started = time.time()
    result = measure(args)
    write(args.results / "attention_error.json", command, result, time.time() - started)
    maps = [f"map {step:g} dB" for step in STEPS_DB]
    print(f"{'tap':14} " + " ".join(f"{name:>16}" for name in ("draws", *ARMS, *maps)))
    for name, row in result.items():
        errors = [f"{row[key]:.4f}" for key in ("draws", *ARMS)]
        errors += [f"{row[key]['error']:.4f} ({row[key]['bytes']:.0f} B)" for key in maps]
        print(f"{name:14} " + " ".join(f"{cell:>16}" for cell in errors))


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return each tap's AT: between two draws, of each cache's codec, of each log-energy map."""
    exact = args.caches / "exact"
    options = ExtractOptions(
        teacher=args.teacher,
        timestep=(args.timestep,),
        quality="fp16",
        draws=2,
        flip=False,
        limit=args.count,
    )
    extract(args.images, exact, options)
    cache = Cache(exact)
    rows = cache.reader.usable_rows.tolist()
    draws = [features(cache, rows, draw) for draw in (0, 1)]
    arms = {arm: Cache(args.caches / name) for arm, name in ARMS.items()}
    errors = {}
    for name in cache.names:
        whitened, scalars = draws[0][name]
        raw = unwhiten(whitened, scalars)
        errors[name] = {
            "draws": float(at_loss(unwhiten(*draws[1][name]), raw)),
            **{
                arm: float(at_loss(unwhiten(encode_decode(c, name, whitened), scalars), raw))
                for arm, c in arms.items()
            },
            **{f"map {step:g} dB": log_energy_map(raw, step) for step in STEPS_DB},
        }
    return errors


def features(
    cache: Cache, rows: list[int], view: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return each tap's whitened features (B, C, H, W) and whitening scalars of one view."""
    coefficients, scalars = cache.coefficients(rows, [view] * len(rows), cache.names)
    decoded = cache.decoder(cache.names)(coefficients)
    return {name: (decoded[name], scalars[name]) for name in cache.names}


def encode_decode(cache: Cache, name: str, whitened_BCHW: torch.Tensor) -> torch.Tensor:
    """Encode and decode a tap's whitened features (B, C, H, W) with one cache's codec."""
    fitted: Any = cache.fit[name]
    values, _, _ = Encoder(fitted)(whitened_BCHW)
    decoded: torch.Tensor = FeatureDecoder({name: fitted})({name: values})[name]
    return decoded


def log_energy_map(raw_BCHW: torch.Tensor, step: float) -> dict[str, float]:
    """Round log-energy maps to `step` decibels; return their AT and their entropy.

    `raw_BCHW` are unwhitened features. The entropy is empirical, in bytes per image.
    """
    exact_BP = attention_map(raw_BCHW)
    levels_BP = (10 * exact_BP.clamp_min(1e-9).log10() / step).round()
    counts = torch.unique(levels_BP, return_counts=True)[1].double()
    bits = -(counts / counts.sum() * (counts / counts.sum()).log2()).sum()
    # attention_map squares its input. With the square root of the energies as its input, it
    # normalises the rounded map in the same way as the exact one.
    rounded_BP = attention_map((10 ** (levels_BP * step / 10)).sqrt()[:, None, :, None])
    error = float((rounded_BP - exact_BP).norm(dim=1).mean())
    return {"error": error, "bytes": float(bits) * levels_BP.shape[1] / 8}


if __name__ == "__main__":
    main()
