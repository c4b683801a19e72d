"""Bytes per view of the CIFAR-10 teacher's features at fixed quantisation steps, in one format.

    python benchmarks/format_bytes.py --data DATA --name format2

Run it at two commits to compare their formats: the same steps give the same distortion. To measure
an older commit, check it out beside this one and copy this file into its benchmarks/. The codec is
fitted on 128 training images, and 512 test images are counted, at t = 20.

Results: docs/results/format_bytes/NAME.json.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from codec_bytes import measure_codec
from features import FeatureInputs, cifar10_features
from records import ROOT, results_flag, write

from dtcache.codec.fit import quantised_fit, tap_statistics
from dtcache.codec.pca_dct import energy_about

STEPS = {"near 50x": 0.8717, "near 100x": 1.5074}
"""Quantisation steps by the ratio to float16 that they give."""
TIMESTEP = 20
FIT_IMAGES = 128
COUNTED_IMAGES = 512


def main() -> None:
    """Measure both steps, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10-*.parquet")
    parser.add_argument("--name", required=True, help="name of the record, such as format2")
    results_flag(parser)
    args = parser.parse_args()
    begun = time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(args.data, Path(folder))
    for ratio, size in result.items():
        print(f"{ratio}: {size['bytes_per_view']:.0f} bytes, distortion {size['distortion']:.4f}")
    command = f"python benchmarks/format_bytes.py --data DATA --name {args.name}"
    write(args.results / "format_bytes" / f"{args.name}.json", command, result, time.time() - begun)


def measured(data: Path, spool: Path) -> dict[str, Any]:
    """Return bytes per view, distortion and the ratio to float16 of each step."""
    inputs = FeatureInputs(
        spool=spool,
        data=data,
        timestep=TIMESTEP,
        num_fit=FIT_IMAGES,
        num_counted=COUNTED_IMAGES,
    )
    features = cifar10_features(inputs, ROOT / "benchmarks" / "teachers" / "cifar10")
    statistics = {name: tap_statistics(maps) for name, maps in features.fit.items()}
    energy = sum(
        float(
            energy_about(
                torch.from_numpy(maps.astype("float32")),
                torch.from_numpy(statistics[name].mean).float(),
            ).sum()
        )
        for name, maps in features.counted.items()
    )
    fp16 = sum(2 * maps[0].size for maps in features.counted.values())
    result = {}
    for ratio, step in STEPS.items():
        fit = {name: quantised_fit(s, step) for name, s in statistics.items()}
        point = measure_codec(fit, step, features.counted, energy / COUNTED_IMAGES).point
        result[ratio] = {
            "step": step,
            "bytes_per_view": point.bytes_per_image,
            "distortion": point.distortion,
            "ratio": fp16 / point.bytes_per_image,
        }
    return result


if __name__ == "__main__":
    main()
