"""Measure the attention loss between decoded and exact features, beside that between noise draws.

    python benchmarks/attention_error.py --caches runs/student_vs_size \
        --images cifar10-test.parquet --teacher DIR \
        --timestep T [--count 256] [--results DIR]

Takes the codecs of the caches of student_vs_size.py, passes uncompressed features of images that no
codec was fitted on through them, and prints AT(decoded, exact) per tap. AT(draw 0, draw 1), between
two noise draws of the same image, gives the scale. The last columns have the error and the entropy
in bytes of a log-energy map rounded to a number of decibels, as it could be stored beside the
payload. Results: docs/results/attention_error.json. If the file exists, the script shows its
content; pass --results with an empty folder to measure again.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from records import Results, results_flag

from dtcache.cache.cache import Cache
from dtcache.codec import FeatureDecoder
from dtcache.codec.pca_dct import Encoder
from dtcache.losses.features import at_loss, attention_map
from dtcache.options import ExtractOptions
from dtcache.whitening import unwhiten
from pipelines.extract.extract import extract

ARMS = ("10x", "50x", "100x")
STEPS_DB = (3.0, 1.0, 0.5)
"""Resolutions of the log-energy maps, in decibels of energy."""


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", type=Path, required=True, help="--work of student_vs_size.py")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--timestep", type=int, required=True)
    parser.add_argument("--count", type=int, default=256)
    results_flag(parser)
    asked = parser.parse_args()
    command = (
        "python benchmarks/attention_error.py --caches CACHES --images IMAGES --teacher TEACHER "
        f"--timestep {asked.timestep} --count {asked.count}"
    )
    result = Results(folder=asked.results, command=command).once(
        "attention_error", lambda: measure(asked)
    )
    maps = [f"map {step:g} dB" for step in STEPS_DB]
    print(f"{'tap':14} " + " ".join(f"{name:>16}" for name in ("draws", *ARMS, *maps)))
    for name, row in result.items():
        errors = [f"{row[key]:.4f}" for key in ("draws", *ARMS)]
        errors += [f"{row[key]['error']:.4f} ({row[key]['bytes']:.0f} B)" for key in maps]
        print(f"{name:14} " + " ".join(f"{cell:>16}" for cell in errors))


def measure(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return AT per tap: between two draws, and between decoded and exact features."""
    exact = asked.caches / "exact"
    options = ExtractOptions(
        teacher=asked.teacher,
        timestep=(asked.timestep,),
        quality="fp16",
        draws=2,
        flip=False,
        limit=asked.count,
    )
    extract(asked.images, exact, options)
    cache = Cache(exact)
    rows = cache.reader.usable_rows.tolist()
    both = [features(cache, rows, draw) for draw in (0, 1)]
    arms = {arm: Cache(asked.caches / f"cache-{arm}") for arm in ARMS}
    found = {}
    for name in cache.names:
        whitened, scalars = both[0][name]
        raw = unwhiten(whitened, scalars)
        found[name] = {
            "draws": float(at_loss(unwhiten(*both[1][name]), raw)),
            **{
                arm: float(at_loss(unwhiten(passed(c, name, whitened), scalars), raw))
                for arm, c in arms.items()
            },
            **{f"map {step:g} dB": log_energy_map(raw, step) for step in STEPS_DB},
        }
    return found


def features(
    cache: Cache, rows: list[int], view: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return whitened features and scalars by tap."""
    coefficients, scalars = cache.coefficients(rows, [view] * len(rows), cache.names)
    decoded = cache.decoder(cache.names)(coefficients)
    return {name: (decoded[name], scalars[name]) for name in cache.names}


def passed(cache: Cache, name: str, whitened_BCHW: torch.Tensor) -> torch.Tensor:
    """Return the features after encoding and decoding with one cache's codec."""
    fitted: Any = cache.fit[name]
    values, _, _ = Encoder(fitted)(whitened_BCHW)
    return FeatureDecoder({name: fitted})({name: values})[name]


def log_energy_map(raw_BCHW: torch.Tensor, step: float) -> dict[str, float]:
    """Return the attention loss of maps rounded to `step` decibels and their empirical entropy,
    bytes per image.
    """
    exact_BP = attention_map(raw_BCHW)
    levels_BP = (10 * exact_BP.clamp_min(1e-9).log10() / step).round()
    counts = torch.unique(levels_BP, return_counts=True)[1].double()
    bits = -(counts / counts.sum() * (counts / counts.sum()).log2()).sum()
    # attention_map squares what it is given, so that it normalises the rounded map as it does a
    # feature's.
    rounded_BP = attention_map((10 ** (levels_BP * step / 10)).sqrt()[:, None, :, None])
    error = float((rounded_BP - exact_BP).norm(dim=1).mean())
    return {"error": error, "bytes": float(bits) * levels_BP.shape[1] / 8}


if __name__ == "__main__":
    main()
