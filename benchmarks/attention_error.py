"""Is the attention loss well served by decoded features? Its error against the exact ones, beside its own noise.

    python benchmarks/attention_error.py --caches runs/student_vs_size --images cifar10-test.parquet --teacher DIR \
        --timestep T [--count 256]

Takes the codecs of the caches of student_vs_size.py, passes uncompressed features of images that no codec was fitted
on through them, and prints AT(decoded, exact) a tap. What another noise draw of the same image does to the target,
AT(draw 0, draw 1), is the scale: an error far under it is nothing that a student could notice. A map of log-energies
beside the payload would cost at least the bytes that are printed last. Results: docs/results/attention_error.json.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from records import ROOT, once

from dtcache.cache import Cache
from dtcache.codec import FeatureDecoder
from dtcache.codec.transform import Encoder
from dtcache.losses import at_loss, attention_map, unwhiten
from dtcache.options import ExtractOptions
from pipelines.extract import extract

ARMS = ("10x", "50x", "100x")
STEP_DB = 3.0
"""Resolution of the map that is priced, decibels of energy: a factor of two."""


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", type=Path, required=True, help="--work of student_vs_size.py")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--timestep", type=int, required=True)
    parser.add_argument("--count", type=int, default=256)
    asked = parser.parse_args()
    command = (
        "python benchmarks/attention_error.py --caches CACHES --images IMAGES --teacher TEACHER "
        f"--timestep {asked.timestep} --count {asked.count}"
    )
    result = once(ROOT / "docs" / "results" / "attention_error.json", command, lambda: measure(asked))
    print(f"{'tap':14} {'draws':>7} " + " ".join(f"{arm:>7}" for arm in ARMS) + f" {'map bytes':>10}")
    for name, row in result.items():
        errors = " ".join(f"{row[arm]:7.4f}" for arm in ARMS)
        print(f"{name:14} {row['draws']:7.4f} {errors} {row['map_bytes']:10.0f}")


def measure(asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return, a tap, the attention loss between two draws and between decoded and exact features of each arm."""
    exact = asked.caches / "exact"
    options = ExtractOptions(
        teacher=asked.teacher, timestep=(asked.timestep,), quality="fp16", draws=2, flip=False, limit=asked.count
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
            **{arm: float(at_loss(unwhiten(passed(c, name, whitened), scalars), raw)) for arm, c in arms.items()},
            "map_bytes": map_bytes(raw),
        }
    return found


def features(cache: Cache, rows: list[int], view: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return whitened features and scalars by tap."""
    coefficients, scalars = cache.coefficients(rows, [view] * len(rows), cache.names)
    decoded = cache.decoder(cache.names)(coefficients)
    return {name: (decoded[name], scalars[name]) for name in cache.names}


def passed(cache: Cache, name: str, whitened_BCHW: torch.Tensor) -> torch.Tensor:
    """Return features after one cache's codec."""
    fitted: Any = cache.fit[name]
    values, _, _ = Encoder(fitted)(whitened_BCHW)
    return FeatureDecoder({name: fitted})({name: values})[name]


def map_bytes(raw_BCHW: torch.Tensor) -> float:
    """Return the empirical entropy of an image's log-energy map at a resolution of 3 dB, bytes."""
    levels = (10 * attention_map(raw_BCHW).clamp_min(1e-9).log10() / STEP_DB).round().long()
    counts = torch.unique(levels, return_counts=True)[1].double()
    bits = -(counts / counts.sum() * (counts / counts.sum()).log2()).sum()
    return float(bits) * levels.shape[1] / 8


if __name__ == "__main__":
    main()
