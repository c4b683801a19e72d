"""One shard of a cache: its rows' images through teacher and codec; it knows no scheduler and no writer."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice

from dtcache.codec import EncodedView, FeatureEncoder
from dtcache.images import LoadedView
from dtcache.images.stored import encode_stored, image_bound
from dtcache.spec import FailedSample
from dtcache.store.commits import CodecSums
from dtcache.store.layout import IMAGES
from dtcache.store.writer import ShardData
from pipelines.job import Job


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
    payloads: dict[str, list[bytes]] = {name: [] for name in [IMAGES, *names]}
    content: list[str | None] = []
    failures: list[FailedSample] = []
    errors, energies = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    bound = image_bound(job.view)
    step = max(1, job.teacher.spec.batch_size // len(job.flips))
    for start in range(rows.start, rows.stop, step):
        batch = list(islice(views, min(step, rows.stop - start)))
        good = [i for i, v in enumerate(batch) if v.pixels_CHW is not None]
        encoded = _encode(job, encoder, [batch[i] for i in good], [start + i for i in good]) if good else {}
        for i, loaded in enumerate(batch):
            row, place = start + i, good.index(i) if i in good else -1
            found = {name: views_of[place] for name, views_of in encoded.items()} if place >= 0 else {}
            infinite = next((name for name, views_of in found.items() if not all(v.finite for v in views_of)), None)
            reason = loaded.failure or (f"teacher output is not finite at {infinite}" if infinite else None)
            content.append(None if loaded.failure else hashlib.sha256(loaded.source).hexdigest())
            if reason is not None:
                failures.append(FailedSample(row=row, key=job.samples[row].key, reason=reason))
            payloads[IMAGES].append(encode_stored(loaded, bound) if reason is None and job.stores_images else b"")
            for name in names:
                payloads[name] += [v.payload for v in found[name]] if reason is None else [b""] * job.views
                if reason is None and (row >= fitted or len(job.samples) == fitted):
                    errors[name] += sum(v.squared_error for v in found[name])
                    energies[name] += sum(v.energy for v in found[name])
        on_rows(len(batch))
    if not job.stores_images:
        del payloads[IMAGES]
    sums = {name: CodecSums(squared_error=errors[name], energy=energies[name]) for name in names}
    return ShardData(shard=shard, payloads=payloads, content_sha256=tuple(content), failures=tuple(failures), sums=sums)


def _encode(
    job: Job, encoder: FeatureEncoder, loaded: list[LoadedView], rows: list[int]
) -> dict[str, list[list[EncodedView]]]:
    """Return, by array and image, the views in their order: draw by draw, each as it is and mirrored."""
    flips = [flip for _ in loaded for flip in job.flips]
    views, view_rows = ([x for x in every for _ in job.flips] for every in (loaded, rows))
    draws = job.teacher.features(job.batch(views, view_rows, flips, range(job.draws)))
    # One draw at a time, unless they are averaged: raw maps of all taps are large.
    groups = [list(draws)] if job.average else ([raw] for raw in draws)
    encoded: dict[str, list[list[EncodedView]]] = {name: [[] for _ in loaded] for name in job.names}
    for group in groups:
        for name, images in encoded.items():
            found = iter(encoder.encode(name, *(raw[name] for raw in group)))
            for image in images:
                image += islice(found, len(job.flips))
    return encoded
