"""Repair: makes damaged files of a cache anew, and publishes only bytes whose SHA-256 is the recorded one."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dtcache.cache import load_fit
from dtcache.codec import FeatureEncoder
from dtcache.device import cpu_threads, resolve_compute
from dtcache.errors import CacheDamagedError
from dtcache.images import load_views, open_source
from dtcache.storage import FolderLock, file_sha256, make_folders, write_file
from dtcache.store.attempt import ShardData
from dtcache.store.commits import ShardObject
from dtcache.store.contents import Contents, Damage, WantedObject, file_problem, read_contents
from dtcache.store.layout import SAMPLES, SHARDS
from dtcache.store.manifest import CacheManifest
from dtcache.store.samples import parquet_bytes, read_table, shards_table
from dtcache.store.shard import build_shard
from dtcache.store.verify import Verification
from pipelines.job import Job, job_with
from pipelines.nodes import zarr_nodes
from pipelines.progress import track
from pipelines.recipe import asked, cache_teacher, fit_rows, options_of, require_same_job
from pipelines.runner import decode_threads
from pipelines.shard import run_shard
from pipelines.verify import Repair, remedy, repairable, verify_cache

OTHER_BYTES = (
    "made anew it has another SHA-256 than the recorded one, so it was not written; "
    "repair on the type of machine, and with the versions, that extraction.log.json names, or extract again"
)


def repair_cache(root: Path, images: Path, teacher: str, share: float, seed: int) -> tuple[Verification, list[Repair]]:
    """Verify a cache under its lock and make what is damaged anew; return what is left, and what came of each file.

    `teacher` is the directory or id of the teacher that the cache was made with, `images` its source. Raises
    CacheBusyError where another process writes the cache, CacheMismatchError or TeacherError where images or teacher
    are others, DiskError, and what verifying raises.
    """
    read_contents(root)  # locking would make the folder
    with FolderLock(root):
        found = verify_cache(root, share, seed)
        outcomes = [
            Repair(path=d.path, outcome="impossible", note=remedy(d)) for d in found.damage if not repairable(d)
        ]
        outcomes += _repair_files(root, found)
        if any(damage.shard is not None for damage in found.damage):
            outcomes += _repair_shards(root, found, images, teacher)
        done = {repair.path for repair in outcomes if repair.outcome == "repaired"}
        return replace(found, damage=tuple(d for d in found.damage if d.path not in done)), outcomes


def _repair_files(root: Path, found: Verification) -> list[Repair]:
    """Make Zarr nodes and the shard index anew, from the manifest and the files that are whole."""
    manifest = found.contents.manifest
    paths = [d.path for d in found.damage if d.shard is None and repairable(d)]
    if manifest is None or not paths:
        return []
    made = zarr_nodes(root, manifest) if any(path != SHARDS for path in paths) else {}
    if SHARDS in paths and not any(damage.shard is not None for damage in found.damage):
        # Its own hash proves that every shard file is the one recorded.
        made[SHARDS] = parquet_bytes(shards_table(_objects(root, found.contents)))
    return [
        _published(root, path, made[path], manifest.files.get(path))
        if path in made
        else Repair(path=path, outcome="refused", note="what it follows from is damaged too; extract again")
        for path in paths
    ]


def _objects(root: Path, contents: Contents) -> Iterator[tuple[int, ShardObject]]:
    """Yield the shard files as they are on disk."""
    for wanted in contents.objects:
        path = root / wanted.path
        yield wanted.shard, ShardObject(path=wanted.path, size=path.stat().st_size, sha256=file_sha256(path))


def _published(root: Path, path: str, content: bytes, sha256: str | None) -> Repair:
    """Write a file's bytes where they are the recorded ones; nothing is touched otherwise."""
    if sha256 is None or hashlib.sha256(content).hexdigest() != sha256:
        return Repair(path=path, outcome="refused", note=OTHER_BYTES)
    make_folders((root / path).parent)
    write_file(root / path, content)
    problem = file_problem(root / path, sha256)
    if problem is not None:
        return Repair(path=path, outcome="refused", note=f"written, but read back wrong: {problem}; check the disk")
    return Repair(path=path, outcome="repaired", note="its SHA-256 is the recorded one")


def _repair_shards(root: Path, found: Verification, images: Path, teacher: str) -> list[Repair]:
    """Compute the shards that have a damaged file again, as the extraction did, and write those files."""
    manifest, outcomes = found.contents.manifest, []
    assert manifest is not None
    wanted = {o.path: o for o in found.contents.objects}
    damaged: dict[int, list[Damage]] = {}
    for damage in found.damage:
        if damage.shard is not None:
            damaged.setdefault(damage.shard, []).append(damage)
    try:
        fit = load_fit(root, manifest)
    except CacheDamagedError as error:
        return [Repair(path=d.path, outcome="refused", note=str(error)) for d in found.damage if d.shard is not None]
    options = options_of(manifest.recipe, teacher)
    job = job_with(open_source(images, track), cache_teacher(root, manifest, teacher), options)
    wanted_recipe = asked(job, options)
    del wanted_recipe["codec"]  # the cache's own fit is used
    require_same_job(root, manifest.recipe, wanted_recipe, job)
    encoder = FeatureEncoder(fit, resolve_compute(options.device, options.precision).device)
    array = next(iter(manifest.arrays.values()))
    rows = {shard: array.rows_of(shard) for shard in damaged}
    with cpu_threads(options.threads), track("repair", sum(map(len, rows.values()))) as progress:
        for shard, files in damaged.items():
            todo = (job.samples[row].index for row in rows[shard])
            views = load_views(job.source, todo, job.view, threads=decode_threads(job.teacher.device))
            work = run_shard(job, encoder, shard, rows[shard], views, fit_rows(len(job.samples)), progress.advance)
            changed = _changed_image(root, found.contents, job, work)
            outcomes += [_republished(root, manifest, wanted[d.path], work, changed) for d in files]
    return outcomes


def _republished(root: Path, manifest: CacheManifest, wanted: WantedObject, work: ShardData, changed: str) -> Repair:
    if wanted.sha256 is None:
        note = "its record is damaged too, so nothing tells the right bytes; mend that first"
        return Repair(path=wanted.path, outcome="refused", note=note)
    array = manifest.arrays[wanted.array.name]
    content = build_shard(work.payloads[array.name], array.length, array.shard_rows * array.payloads_a_row)
    made = _published(root, wanted.path, content, wanted.sha256)
    return replace(made, note=changed) if made.note == OTHER_BYTES and changed else made


def _changed_image(root: Path, contents: Contents, job: Job, work: ShardData) -> str:
    """Return a line about the first image whose bytes are not those that were cached, or nothing."""
    return next(
        (
            f"image {job.samples[row].key} has changed since, so it was not written; give the images of the extraction"
            for row, known, now in _hashes(root, contents, work)
            if known != now
        ),
        "",
    )


def _hashes(root: Path, contents: Contents, work: ShardData) -> Iterator[tuple[int, str | None, str | None]]:
    manifest = contents.manifest
    assert manifest is not None
    rows = next(iter(manifest.arrays.values())).rows_of(work.shard)
    known: Sequence[str | None] = []
    if work.shard in contents.records:
        known = contents.records[work.shard].content_sha256
    elif contents.keys is not None:
        column = read_table(root / SAMPLES)["content_sha256"]
        known = [value.hex() if value is not None else None for value in column[rows.start : rows.stop].to_pylist()]
    return zip(rows, known, work.content_sha256, strict=False)
