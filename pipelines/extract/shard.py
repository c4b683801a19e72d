"""Computes one shard of a cache: from images, by the teacher and the codec, to payloads.

The calling thread runs the teacher and the quantiser. Other threads draw the noise before a pass
and code the payloads after it. On a GPU they do so during the passes of other batches; on a CPU
they do so between the passes, since both would compete for the same cores. Shape suffixes: C
channels, H rows, W columns.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from dtcache.codec import EncodedView, FeatureEncoder, QuantisedMaps
from dtcache.images import LoadedView
from dtcache.images.stored_images import encode_stored, image_bound
from dtcache.recipe import FailedSample, array_of
from dtcache.store.commits import CodecSums, EmptySample
from dtcache.store.layout import IMAGES
from dtcache.store.pending_shard import ShardData
from dtcache.teacher import TeacherInput
from pipelines.extract.plan import ExtractionPlan

T = TypeVar("T")

AHEAD = 2
"""Batches that are prepared ahead of a GPU, and batches that may wait for the entropy coder."""
MAX_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRow:
    """The image of one row, ready for the teacher."""

    row: int
    loaded: LoadedView
    inputs: tuple[TeacherInput, ...]
    """One per flip; none if the image cannot be decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """The content of one row of a shard."""

    content_sha256: str | None
    """SHA-256 of the image file; None if the image cannot be decoded."""
    reason: str | None
    """Why the row failed, or None."""
    image: bytes
    views: dict[str, list[EncodedView]]
    """By tap: draw by draw, each without and with mirroring; empty if the row failed."""
    payloads: dict[str, list[bytes]]
    """By array, in the same order; empty if the row failed."""
    emptiness: str | None = None
    """Why the image surely shows nothing, or None."""


def shard_data(
    plan: ExtractionPlan, shard: int, rows: range, packed: Sequence[PackedRow], fit_rows: int
) -> ShardData:
    """Return the content of a shard from its rows, in order.

    The codec's error is summed over rows that the codec was not fitted on, or over all rows if it
    was fitted on all.
    """
    names = plan.names
    payloads: dict[str, list[bytes]] = {array_of(name): [] for name in names}
    errors = dict.fromkeys(names, 0.0)
    energies = dict.fromkeys(names, 0.0)
    sizes = dict.fromkeys(names, 0)
    failures: list[FailedSample] = []
    empty: list[EmptySample] = []
    for row, content in zip(rows, packed, strict=True):
        if content.reason is not None:
            failures.append(FailedSample(row=row, key=plan.samples[row].key, reason=content.reason))
        elif content.emptiness is not None:
            key = plan.samples[row].key
            empty.append(EmptySample(row=row, key=key, reason=content.emptiness))
        for array, of_views in payloads.items():
            of_views += content.payloads.get(array) or [b""] * plan.num_views
        for name in names:
            encoded = content.views.get(name, [])
            sizes[name] += sum(len(v.section) for v in encoded)
            if row >= fit_rows or len(plan.samples) == fit_rows:
                errors[name] += sum(v.squared_error for v in encoded)
                energies[name] += sum(v.energy for v in encoded)
    if plan.options.store_images:
        payloads[IMAGES] = [content.image for content in packed]
    return ShardData(
        shard=shard,
        payloads=payloads,
        content_sha256=tuple(content.content_sha256 for content in packed),
        failures=tuple(failures),
        sums={
            name: CodecSums(
                squared_error=errors[name], energy=energies[name], section_bytes=sizes[name]
            )
            for name in names
        },
        empty=tuple(empty),
    )


def packed_rows(
    plan: ExtractionPlan,
    encoder: FeatureEncoder,
    rows: range,
    views: Iterator[LoadedView],
    on_rows: Callable[[int], None],
) -> Iterator[PackedRow]:
    """Yield the packed rows in order, a pure function of the plan and the codec.

    `views` yields the images of these rows in order. `on_rows` is called with the number of rows
    of each finished batch.
    """
    device = plan.teacher.device
    on_gpu = device.type == "cuda"
    ahead = batches_ahead(device)
    stream = torch.cuda.Stream(device) if on_gpu else None
    size = max(1, plan.teacher.spec.batch_size // len(plan.flips))
    threads = (os.cpu_count() or 1) if on_gpu else torch.get_num_threads()
    with ThreadPoolExecutor(min(MAX_THREADS, threads), "host") as pool:
        preparing = (
            [
                partial(_prepare, plan, row, loaded)
                for row, loaded in zip(rows[start : start + size], views, strict=False)
            ]
            for start in range(0, len(rows), size)
        )
        packing = (
            _pack_tasks(plan, encoder, batch, stream)
            for batch in in_threads(pool, preparing, ahead=ahead)
        )
        for batch in in_threads(pool, packing, ahead=ahead):
            yield from batch
            on_rows(len(batch))


def batches_ahead(device: torch.device) -> int:
    """Return how many batches are prepared ahead, and how many may wait for the entropy coder."""
    return AHEAD if device.type == "cuda" else 0


def in_threads(
    pool: Executor, groups: Iterable[Sequence[Callable[[], T]]], *, ahead: int
) -> Iterator[list[T]]:
    """Run the tasks of each group in `pool` and yield their results, group by group, in order.

    The calling thread takes groups from `groups`; besides the group that is yielded next, up to
    `ahead` groups run, or are finished and wait. With `ahead` 0, a group is taken, run and yielded
    before the next is taken. Raises what a task raises.
    """
    waiting: deque[list[Future[T]]] = deque()
    try:
        for group in groups:
            waiting.append([pool.submit(task) for task in group])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        for future in (future for group in waiting for future in group):
            future.cancel()


def _prepare(plan: ExtractionPlan, row: int, loaded: LoadedView) -> PreparedRow:
    pixels_CHW = loaded.pixels_CHW
    inputs = (
        tuple(plan.input(pixels_CHW, row, flip, range(plan.options.draws)) for flip in plan.flips)
        if pixels_CHW is not None
        else ()
    )
    return PreparedRow(row=row, loaded=loaded, inputs=inputs)


def _pack_tasks(
    plan: ExtractionPlan,
    encoder: FeatureEncoder,
    batch: Sequence[PreparedRow],
    stream: torch.cuda.Stream | None,
) -> list[Callable[[], PackedRow]]:
    """Run the teacher and the quantiser on a batch; return the remaining task of each row."""
    inputs = [view for prepared in batch for view in prepared.inputs]
    groups: list[dict[str, QuantisedMaps]] = []
    if inputs:
        draws = plan.teacher.features(plan.teacher.batch(inputs))
        # Unless draws are averaged, one draw at a time: the raw maps of all taps are large.
        for group in [list(draws)] if plan.options.average else ([raw] for raw in draws):
            maps = {
                name: encoder.quantise(name, *(raw[name] for raw in group)) for name in plan.names
            }
            groups.append({name: quantised.to_host(stream) for name, quantised in maps.items()})
    tasks: list[Callable[[], PackedRow]] = []
    start = 0
    for prepared in batch:
        positions = range(start, start + len(prepared.inputs))
        tasks.append(partial(_pack, plan, encoder, prepared, groups, positions))
        start = positions.stop
    return tasks


def _pack(
    plan: ExtractionPlan,
    encoder: FeatureEncoder,
    prepared: PreparedRow,
    groups: Sequence[dict[str, QuantisedMaps]],
    positions: range,
) -> PackedRow:
    """Entropy-code the views of a row, which are at `positions` of every group, and its image."""
    loaded = prepared.loaded
    if loaded.failure is not None:
        return PackedRow(
            content_sha256=None, reason=loaded.failure, image=b"", views={}, payloads={}
        )
    content_sha256 = hashlib.sha256(loaded.source).hexdigest()
    views = {
        name: [v for maps in groups for v in encoder.pack(name, maps[name], positions)]
        for name in plan.names
    }
    infinite = next(
        (name for name, encoded in views.items() if not all(v.finite for v in encoded)), None
    )
    if infinite is not None:
        reason = f"teacher output is not finite at {infinite}"
        return PackedRow(
            content_sha256=content_sha256, reason=reason, image=b"", views={}, payloads={}
        )
    image = encode_stored(loaded, image_bound(plan.view)) if plan.options.store_images else b""
    return PackedRow(
        content_sha256=content_sha256,
        reason=None,
        image=image,
        views=views,
        payloads=encoder.payloads(views),
        emptiness=loaded.emptiness,
    )
