"""Soft labels of a cache by an interpreter: the codec's fit, and any shard of the label set.

B rows, V views, K classes, H x W grid of the logits.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from dtcache.cache.batch import Rows
from dtcache.cache.cache import Cache
from dtcache.cache.fitted_codec import load_fit
from dtcache.codec import FeatureEncoder, sections_of, sha256_fit
from dtcache.codec.fit import Solved, solve_step, tap_statistics
from dtcache.device import resolve_compute
from dtcache.device_memory import memory_errors
from dtcache.errors import CacheIncompleteError, CodecError
from dtcache.labels import SCORES, Interpreter, require_serves
from dtcache.labels.label_decoder import join_views
from dtcache.options import LabelWriteOptions
from dtcache.process_settings import configure_process, cpu_threads
from dtcache.recipe import (
    CodecSpec,
    FailedSample,
    Json,
    LabelSpec,
    Recipe,
    Sample,
    TapSpec,
    TeacherSpec,
    ViewSpec,
    array_of,
)
from dtcache.store.commits import CodecSums
from dtcache.store.layout import LOGITS, SAMPLES, payload_arrays
from dtcache.store.manifest import CacheManifest
from dtcache.store.parquet_tables import parquet_bytes
from dtcache.store.pending_shard import ShardData
from dtcache.store.sample_index import samples_table
from dtcache.store.summary import inspect_cache
from dtcache.store.writer import CacheWriter
from dtcache.whitening import whiten
from pipelines.extract.fit_codec import fit_rows
from pipelines.size_estimate import FeatureSize
from pipelines.terminal.progress import track

AIM = 0.98
"""The fit aims at this share of the requested bytes, as it predicts the size from few rows."""
FIXED_BYTES = 8000
"""Bytes of manifest and shard index, independent of the number of images."""
MAX_FIT_VALUES = 1 << 28
"""Most logits that the codec is fitted on, which bounds the rows of large maps."""
FIT_BATCH = 32
"""Rows per pass while logits for the fit are computed."""


class LabelWriter:
    """Labels any rows of a cache with an interpreter."""

    def __init__(self, root: Path, interpreter: Interpreter, options: LabelWriteOptions) -> None:
        """Open the cache `root`.

        Raises CacheMismatchError, naming the difference, if the interpreter was fitted to other
        features; ConfigError for the device; and what opening a cache raises.
        """
        cache = Cache(root)
        compute = resolve_compute(options.device, "fp32")
        configure_process(compute.device)
        shapes = {name: cache.shape(name) for name in cache.names}
        require_serves(interpreter.spec, root, cache.reader.manifest.recipe, shapes)
        self.cache = cache
        self._interpreter = interpreter
        self._compute = compute
        self._options = options
        self._names = list(interpreter.spec.shapes)
        self._network = interpreter.network.to(compute.device)
        self._decoder = cache.decoder(self._names).to(compute.device)
        self._mirrored = [
            cache.reader.manifest.is_mirrored(view) for view in range(cache.num_views)
        ]
        report = inspect_cache(root)
        feature_bytes = report["parts"]["coefficients"] + report["parts"]["codec"]
        self._target = AIM * options.share * feature_bytes / max(1, report["num_done"])
        """Bytes per image."""

    @torch.no_grad()
    def logits(self, rows: Rows) -> Tensor:
        """Return exact logits of every view of usable rows, fp32 (B, V, K, H, W) on the host."""
        views = self.cache.num_views
        row_of = np.repeat(rows, views)
        view_of = np.tile(np.arange(views, dtype=np.int64), len(rows))
        size = self._options.batch_size
        batches = []
        for start in range(0, len(row_of), size):
            chosen = slice(start, start + size)
            coefficients, _ = self.cache.coefficients(row_of[chosen], view_of[chosen], self._names)
            with memory_errors(size, "pass a smaller `batch_size`"):
                maps = self._decoder(
                    {name: values.to(self._compute.device) for name, values in coefficients.items()}
                )
                batches.append(self._network(maps).cpu())
        logits = torch.cat(batches)
        return logits.view(len(rows), views, *logits.shape[1:])

    def create(self, out: Path) -> CacheWriter:
        """Fit the codec and create the label set's files, the manifest last.

        Raises CacheIncompleteError if no row has features.
        """
        samples = self._samples()
        rows = self.cache.reader.usable_rows
        if not len(rows):
            raise CacheIncompleteError(
                f"{self.cache.reader.location}: no image has features; extract them before "
                "labelling"
            )
        height, width = self._interpreter.spec.grid
        values = len(self._interpreter.spec.classes) * len(self._mirrored) * height * width
        fitted = rows[: max(1, min(fit_rows(len(self.cache)), MAX_FIT_VALUES // values))]
        solved = self._fitted(fitted, samples)
        recipe = self._recipe(solved, int(fitted[-1]) + 1)
        bounds = {array: sections.bound for array, sections in sections_of(solved.fit).items()}
        return CacheWriter.create(
            out,
            recipe,
            payload_arrays(recipe, 0, bounds),
            {LOGITS: solved.fit[LOGITS].arrays()},
            samples,
            None,
        )

    def write(self, writer: CacheWriter) -> None:
        """Label and commit the missing shards."""
        rows_of = writer.manifest.rows_of
        remaining = sum(len(rows_of(shard)) for shard in writer.missing)
        encoder = label_encoder(writer.root, writer.manifest)
        with track("label write", len(self.cache), len(self.cache) - remaining) as progress:
            for shard in writer.missing:
                writer.write_shard(self.shard(writer.manifest, encoder, shard))
                progress.advance(len(rows_of(shard)))

    def shard(self, manifest: CacheManifest, encoder: FeatureEncoder, shard: int) -> ShardData:
        """Label and encode a shard's rows for the label set of `manifest`.

        Raises CodecError if a logit is not finite.
        """
        rows = manifest.rows_of(shard)
        fitted = int(manifest.recipe["codec"]["fit_rows"])
        usable = np.intersect1d(np.array(rows), self.cache.reader.usable_rows)
        payloads = dict.fromkeys(rows, b"")
        sums = [0.0, 0.0]
        size = 0
        step = max(1, self._options.batch_size // self.cache.num_views)
        for start in range(0, len(usable), step):
            chosen = usable[start : start + step]
            views = encoder.encode(LOGITS, self._joined(chosen))
            [joined] = encoder.payloads({LOGITS: views}).values()
            for row, view, payload in zip(chosen.tolist(), views, joined, strict=True):
                if not view.finite:
                    key = self.cache.samples["key"][row]
                    raise CodecError(
                        f"the logits of {key} are not finite; fit the interpreter again with a "
                        "lower lr"
                    )
                payloads[row] = payload
                size += len(view.section)
                if row >= fitted or len(self.cache) == fitted:
                    sums = [sums[0] + view.squared_error, sums[1] + view.energy]
        failed = self.cache.samples.slice(rows.start, len(rows)).to_pylist()
        return ShardData(
            shard=shard,
            payloads={array_of(LOGITS): [payloads[row] for row in rows]},
            content_sha256=(None,) * len(rows),
            failures=tuple(
                FailedSample(row=s["row"], key=s["key"], reason=s["failure"])
                for s in failed
                if s["failure"] is not None
            ),
            sums={LOGITS: CodecSums(squared_error=sums[0], energy=sums[1], section_bytes=size)},
        )

    def fixed_fields(self) -> Json:
        """Return the fields of the recipe that do not depend on the codec's fit."""
        recipe = self._recipe(None, 0).to_json()
        codec = {"ratio": recipe["codec"]["ratio"]}
        return {"labels": recipe["labels"], "teacher": recipe["teacher"], "codec": codec}

    def _joined(self, rows: Rows) -> Tensor:
        """Return (B, V x K, H, W): logits minus their mean over classes, which softmax ignores."""
        logits = self.logits(rows)
        return join_views(logits - logits.mean(2, keepdim=True), self._mirrored)

    def _fitted(self, rows: Rows, samples: list[Sample]) -> Solved:
        """Fit the codec's transform, in one thread, and solve its step for the requested bytes."""
        maps = torch.cat(
            [
                whiten(self._joined(rows[start : start + FIT_BATCH]))[0].half()
                for start in range(0, len(rows), FIT_BATCH)
            ]
        )
        if not bool(maps.isfinite().all()):
            raise CodecError(
                "the interpreter's logits are not finite; fit it again with a lower lr"
            )
        table = samples_table((s.key for s in samples), (s.label for s in samples))
        index_bytes = len(parquet_bytes(table))
        with cpu_threads(1), threadpool_limits(1):
            statistics = {LOGITS: tap_statistics(maps.numpy()[None])}
            size = FeatureSize(
                images=len(samples),
                views=1,
                target=self._target,
                row_bytes=(index_bytes + FIXED_BYTES) / len(samples),
                sized_views=len(maps),
            )
            return solve_step(
                statistics,
                lambda fit: size.bytes_per_view(fit, statistics),
                self._target,
                "distortion",
            )

    def _samples(self) -> list[Sample]:
        table = self.cache.samples
        pairs: Iterator[tuple[str, int | None]] = zip(
            table["key"].to_pylist(), table["label"].to_pylist(), strict=True
        )
        return [Sample(index=row, key=key, label=label) for row, (key, label) in enumerate(pairs)]

    def _recipe(self, solved: Solved | None, fitted: int) -> Recipe:
        """Return the recipe of the label set; without `solved`, the fields of the fit are empty."""
        own = self.cache.reader.manifest
        spec = self._interpreter.spec
        channels = len(spec.classes) * len(self._mirrored)
        height, width = spec.grid
        scores = spec.validation and {name: spec.validation[name] for name in SCORES}
        on_cpu = self._compute.device.type == "cpu"
        return Recipe(
            teacher=TeacherSpec(
                architecture="FeatureInterpreter",
                weights_sha256=self._interpreter.weights_sha256,
                config_sha256=self._interpreter.config_sha256,
                timesteps=(0,),
                alpha_bars=(1.0,),
                precision="fp32",
                taps=(
                    TapSpec(
                        name=LOGITS.rpartition("/")[2],
                        block=0,
                        stride=self.cache.view.height // height,
                        channels=channels,
                        height=height,
                        width=width,
                    ),
                ),
                batch_size=self._options.batch_size,
                device_type=self._compute.device.type,
            ),
            view=ViewSpec(**asdict(self.cache.view)),
            codec=CodecSpec(
                ratio=2 * channels * height * width / self._target,
                step=solved.step if solved else None,
                fit_rows=fitted,
                fit_sha256=sha256_fit(solved.fit) if solved else "",
                noise_share={LOGITS: 0.0},
                noise_floor={LOGITS: 0.0},
                determined_error=solved.determined_error if solved else {},
            ),
            samples_sha256=own.recipe["samples_sha256"],
            num_samples=len(self.cache),
            flips=False,
            seed=own.recipe["seed"],
            shard_rows=own.recipe["shard_rows"],
            store_images=False,
            threads=torch.get_num_threads() if on_cpu else None,
            labels=LabelSpec(
                level=spec.level,
                classes=spec.classes,
                views=len(self._mirrored),
                cache_fingerprint=own.fingerprint,
                cache_samples=own.files[SAMPLES],
                validation=scores,
            ),
        )


def label_encoder(root: Path, manifest: CacheManifest) -> FeatureEncoder:
    """Read the codec of the label set at `root`. Raises CacheDamagedError."""
    return FeatureEncoder(load_fit(root, manifest), torch.device("cpu"))
