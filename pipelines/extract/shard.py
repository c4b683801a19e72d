"""One shard of a cache: its rows' images through teacher and codec; it knows no scheduler and no writer.

The calling thread drives the teacher and the quantiser. Noise is made before a batch, and payloads after it, in
threads: beside other batches' passes on a GPU, between them on a CPU, where both would fight for the same cores.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from dtcache.codec import EncodedView, FeatureEncoder, QuantisedMaps
from dtcache.images import LoadedView
from dtcache.images.stored_images import encode_stored, image_bound
from dtcache.recipe import FailedSample
from dtcache.store.commits import CodecSums
from dtcache.store.layout import IMAGES
from dtcache.store.pending_shard import ShardData
from dtcache.teacher import TeacherInput
from pipelines.extract.overlap import in_threads
from pipelines.extract.plan import Job

AHEAD = 2
"""Batches that a GPU finds ready, and batches that may wait for the entropy coder."""
MAX_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRow:
    """One row's image before the teacher."""

    row: int
    loaded: LoadedView
    inputs: tuple[TeacherInput, ...]
    """One a flip; none where the image failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One row as it is written."""

    content_sha256: str | None
    reason: str | None
    """Why the row failed."""
    image: bytes
    views: dict[str, list[EncodedView]]
    """By array: draw by draw, each as it is and mirrored."""


def run_shard(
    job: Job,
    encoder: FeatureEncoder,
    shard: int,
    rows: range,
    views: Iterator[LoadedView],
    fitted: int,
    on_rows: Callable[[int], None],
) -> ShardData:
    """Compute one shard from `views`, which yields its rows' images in order; a pure function of the job."""
    names = job.names
    payloads: dict[str, list[bytes]] = {
        name: [] for name in ([IMAGES] if job.stores_images else []) + names
    }
    content: list[str | None] = []
    failures: list[FailedSample] = []
    errors = dict.fromkeys(names, 0.0)
    energies = dict.fromkeys(names, 0.0)
    for row, packed in zip(rows, packed_rows(job, encoder, rows, views, on_rows), strict=True):
        content.append(packed.content_sha256)
        if packed.reason is not None:
            failures.append(FailedSample(row=row, key=job.samples[row].key, reason=packed.reason))
        if job.stores_images:
            payloads[IMAGES].append(packed.image)
        for name in names:
            encoded = packed.views.get(name, [])
            payloads[name] += [v.payload for v in encoded] if encoded else [b""] * job.views
            if row >= fitted or len(job.samples) == fitted:
                errors[name] += sum(v.squared_error for v in encoded)
                energies[name] += sum(v.energy for v in encoded)
    sums = {name: CodecSums(squared_error=errors[name], energy=energies[name]) for name in names}
    return ShardData(
        shard=shard,
        payloads=payloads,
        content_sha256=tuple(content),
        failures=tuple(failures),
        sums=sums,
    )


def packed_rows(
    job: Job,
    encoder: FeatureEncoder,
    rows: range,
    views: Iterator[LoadedView],
    on_rows: Callable[[int], None],
) -> Iterator[PackedRow]:
    """Yield the rows in order; `on_rows` hears of every finished batch."""
    on_gpu = job.teacher.device.type == "cuda"
    ahead = batches_ahead(job.teacher.device)
    stream = torch.cuda.Stream(job.teacher.device) if on_gpu else None
    size = max(1, job.teacher.spec.batch_size // len(job.flips))
    threads = (os.cpu_count() or 1) if on_gpu else torch.get_num_threads()
    with ThreadPoolExecutor(min(MAX_THREADS, threads), "host") as pool:
        preparing = (
            [
                partial(_prepare, job, row, loaded)
                for row, loaded in zip(rows[at : at + size], views, strict=False)
            ]
            for at in range(0, len(rows), size)
        )
        packing = (
            _pack_tasks(job, encoder, batch, stream)
            for batch in in_threads(pool, preparing, ahead=ahead)
        )
        for batch in in_threads(pool, packing, ahead=ahead):
            yield from batch
            on_rows(len(batch))


def batches_ahead(device: torch.device) -> int:
    """Return how many batches are made ready, and may wait, beside the passes on a device."""
    return AHEAD if device.type == "cuda" else 0


def _prepare(job: Job, row: int, loaded: LoadedView) -> PreparedRow:
    failed = loaded.pixels_CHW is None
    flips = () if failed else job.flips
    inputs = tuple(job.input(loaded, row, flip, range(job.draws)) for flip in flips)
    return PreparedRow(row=row, loaded=loaded, inputs=inputs)


def _pack_tasks(
    job: Job,
    encoder: FeatureEncoder,
    batch: Sequence[PreparedRow],
    stream: torch.cuda.Stream | None,
) -> list[Callable[[], PackedRow]]:
    """Run the teacher and the quantiser on a batch and return what is left to do for each of its rows."""
    inputs = [view for prepared in batch for view in prepared.inputs]
    groups: list[dict[str, QuantisedMaps]] = []
    if inputs:
        draws = job.teacher.features(job.teacher.batch(inputs))
        # One draw at a time, unless they are averaged: raw maps of all taps are large.
        for group in [list(draws)] if job.average else ([raw] for raw in draws):
            maps = {
                name: encoder.quantise(name, *(raw[name] for raw in group)) for name in job.names
            }
            groups.append({name: quantised.to_host(stream) for name, quantised in maps.items()})
    tasks: list[Callable[[], PackedRow]] = []
    place = 0
    for prepared in batch:
        places = range(place, place + len(prepared.inputs))
        tasks.append(partial(_pack, job, encoder, prepared, groups, places))
        place = places.stop
    return tasks


def _pack(
    job: Job,
    encoder: FeatureEncoder,
    prepared: PreparedRow,
    groups: Sequence[dict[str, QuantisedMaps]],
    places: range,
) -> PackedRow:
    """Entropy-code a row's views, which lie at `places` of every group, and encode its image."""
    loaded = prepared.loaded
    if loaded.failure is not None:
        return PackedRow(content_sha256=None, reason=loaded.failure, image=b"", views={})
    content = hashlib.sha256(loaded.source).hexdigest()
    views = {
        name: [v for maps in groups for v in encoder.pack(name, maps[name], places)]
        for name in job.names
    }
    infinite = next(
        (name for name, found in views.items() if not all(v.finite for v in found)), None
    )
    if infinite is not None:
        reason = f"teacher output is not finite at {infinite}"
        return PackedRow(content_sha256=content, reason=reason, image=b"", views={})
    image = encode_stored(loaded, image_bound(job.view)) if job.stores_images else b""
    return PackedRow(content_sha256=content, reason=None, image=image, views=views)
