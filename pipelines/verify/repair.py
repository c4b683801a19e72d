"""Repair: makes what is damaged of a cache and its label sets anew; publishes only bytes of the recorded SHA-256."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from dtcache.atomic_files import FolderLock, file_sha256, make_folders, write_file
from dtcache.cache.cache import load_fit
from dtcache.codec import FeatureEncoder
from dtcache.device import cpu_threads, resolve_compute
from dtcache.errors import CacheDamagedError, CacheError
from dtcache.images import load_views, open_source
from dtcache.labels import Interpreter, load_interpreter
from dtcache.options import LabelWriteOptions, VerifyOptions
from dtcache.store.commits import ShardObject
from dtcache.store.contents import Contents, WantedObject, file_problem, read_contents
from dtcache.store.label_sets import label_set_names
from dtcache.store.layout import LABELS, SAMPLES, SHARDS
from dtcache.store.manifest import CacheManifest, require_same
from dtcache.store.pending_shard import ShardData
from dtcache.store.sample_index import parquet_bytes, read_table, shards_table
from dtcache.store.shard import build_shard
from dtcache.store.verify import Verification
from dtcache.store.zarr_nodes import zarr_nodes
from pipelines.extract.plan import Job, job_with
from pipelines.extract.recipe_options import (
    asked,
    cache_teacher,
    fit_rows,
    options_of,
    require_same_job,
)
from pipelines.extract.shard import run_shard
from pipelines.extract.shard_runner import decode_threads
from pipelines.label.label_writer import LabelJob, label_encoder
from pipelines.terminal.progress import track
from pipelines.verify.verify import Repair, afresh, remedy, repairable, verify_cache

OTHER_BYTES = (
    "made anew it has another SHA-256 than the recorded one, so it was not written; repair on the type of machine, and "
    "with the versions, that wrote it (extraction.log.json names an extraction's), or make all of it again"
)


def repair_cache(
    root: Path, options: VerifyOptions, share: float
) -> tuple[Verification, list[Repair]]:
    """Verify a cache and its label sets under their locks and make what is damaged anew.

    Returns what is left, and what came of each file. Raises CacheBusyError where another process writes one of them,
    CacheMismatchError or TeacherError where images or teacher are not those of the extraction, ConfigError where the
    interpreter is none, DiskError, and what verifying raises.
    """
    read_contents(root)  # locking would make the folder
    interpreter = load_interpreter(options.interpreter) if options.interpreter is not None else None
    with ExitStack() as locks:
        for folder in (root, *(root / LABELS / name for name in label_set_names(root))):
            locks.enter_context(FolderLock(folder))
        found = verify_cache(root, share, options.seed)
        left, outcomes = _repaired(root, found, None, lambda: _feature_shards(root, found, options))
        labels = {}
        for name, inner in found.labels.items():
            make = partial(_label_shards, root, name, inner, interpreter)
            labels[name], of_set = _repaired(root / LABELS / name, inner, name, make)
            outcomes += [
                replace(repair, path=f"{LABELS}/{name}/{repair.path}") for repair in of_set
            ]
        return replace(left, labels=labels), outcomes


def _repaired(
    root: Path, found: Verification, label_set: str | None, make_shards: Callable[[], list[Repair]]
) -> tuple[Verification, list[Repair]]:
    """Repair the cache, or the label set, at `root`; return what is left, and what came of each file."""
    outcomes = [
        Repair(path=d.path, outcome="impossible", note=remedy(d, label_set))
        for d in found.damage
        if not repairable(d)
    ]
    outcomes += _repair_files(root, found, label_set)
    if _damaged_shards(found):
        outcomes += make_shards()
    done = {repair.path for repair in outcomes if repair.outcome == "repaired"}
    return replace(found, damage=tuple(d for d in found.damage if d.path not in done)), outcomes


def _damaged_shards(found: Verification) -> dict[int, list[WantedObject]]:
    """Return the damaged files of each shard that has one."""
    wanted = {o.path: o for o in found.contents.objects}
    damaged = dict[int, list[WantedObject]]()
    for damage in found.damage:
        if damage.shard is not None:
            damaged.setdefault(damage.shard, []).append(wanted[damage.path])
    return damaged


def _refused(found: Verification, note: str) -> list[Repair]:
    """Return the refusal of every damaged shard file."""
    return [
        Repair(path=d.path, outcome="refused", note=note)
        for d in found.damage
        if d.shard is not None
    ]


def _repair_files(root: Path, found: Verification, label_set: str | None) -> list[Repair]:
    """Make Zarr nodes and the shard index anew, from the manifest and the files that are whole."""
    manifest = found.contents.manifest
    paths = [d.path for d in found.damage if d.shard is None and repairable(d)]
    if manifest is None or not paths:
        return []
    made = zarr_nodes(root, manifest) if any(path != SHARDS for path in paths) else {}
    if SHARDS in paths and not _damaged_shards(found):
        # Its own hash proves that every shard file is the one recorded.
        made[SHARDS] = parquet_bytes(shards_table(_objects(root, found.contents)))
    return [
        _published(root, path, made[path], manifest.files.get(path))
        if path in made
        else Repair(
            path=path,
            outcome="refused",
            note=f"what it follows from is damaged too; {afresh(label_set)}",
        )
        for path in paths
    ]


def _objects(root: Path, contents: Contents) -> Iterator[tuple[int, ShardObject]]:
    """Yield the shard files as they are on disk."""
    for wanted in contents.objects:
        path = root / wanted.path
        yield (
            wanted.shard,
            ShardObject(path=wanted.path, size=path.stat().st_size, sha256=file_sha256(path)),
        )


def _published(root: Path, path: str, content: bytes, sha256: str | None) -> Repair:
    """Write a file's bytes where they are the recorded ones; nothing is touched otherwise."""
    if sha256 is None or hashlib.sha256(content).hexdigest() != sha256:
        return Repair(path=path, outcome="refused", note=OTHER_BYTES)
    make_folders((root / path).parent)
    write_file(root / path, content)
    problem = file_problem(root / path, sha256)
    if problem is not None:
        return Repair(
            path=path,
            outcome="refused",
            note=f"written, but read back wrong: {problem}; check the disk",
        )
    return Repair(path=path, outcome="repaired", note="its SHA-256 is the recorded one")


def _feature_shards(root: Path, found: Verification, options: VerifyOptions) -> list[Repair]:
    """Compute the shards that have a damaged file again, as the extraction did, and write those files."""
    manifest = found.contents.manifest
    outcomes = list[Repair]()
    assert manifest is not None
    if options.images is None or options.teacher is None:
        return _refused(found, "give --images and --teacher, of which it is computed")
    try:
        fit = load_fit(root, manifest)
    except CacheDamagedError as error:
        return _refused(found, str(error))
    asked_for = options_of(manifest.recipe, options.teacher)
    job = job_with(
        open_source(options.images, track),
        cache_teacher(root, manifest, options.teacher),
        asked_for,
    )
    wanted_recipe = asked(job, asked_for)
    del wanted_recipe["codec"]  # the cache's own fit is used
    require_same_job(root, manifest.recipe, wanted_recipe, job)
    encoder = FeatureEncoder(fit, resolve_compute(asked_for.device, asked_for.precision).device)
    array = next(iter(manifest.arrays.values()))
    damaged = _damaged_shards(found)
    rows = {shard: array.rows_of(shard) for shard in damaged}
    with cpu_threads(asked_for.threads), track("repair", sum(map(len, rows.values()))) as progress:
        for shard, files in damaged.items():
            todo = (job.samples[row].index for row in rows[shard])
            views = load_views(
                job.source, todo, job.view, threads=decode_threads(job.teacher.device)
            )
            work = run_shard(
                job,
                encoder,
                shard,
                rows[shard],
                views,
                fit_rows(len(job.samples)),
                progress.advance,
            )
            changed = _changed_image(root, found.contents, job, work)
            outcomes += [_republished(root, manifest, wanted, work, changed) for wanted in files]
    return outcomes


def _label_shards(
    root: Path, name: str, found: Verification, interpreter: Interpreter | None
) -> list[Repair]:
    """Compute the damaged shards of a label set again from the cache's features, and write their files."""
    manifest = found.contents.manifest
    outcomes = list[Repair]()
    label_set = root / LABELS / name
    assert manifest is not None
    teacher = manifest.recipe["teacher"]
    if interpreter is None or interpreter.weights_sha256 != teacher["weights_sha256"]:
        whose = f"the interpreter that wrote it, whose weights' SHA-256 is {teacher['weights_sha256'][:16]}..."
        return _refused(found, f"give --interpreter, {whose}")
    try:
        options = LabelWriteOptions(
            name=name, batch_size=teacher["batch_size"], device=teacher["device_type"]
        )
        job = LabelJob(root, interpreter, options)
        wanted_recipe = job.asked()
        del wanted_recipe["codec"]  # the set's own fit is used
        require_same(label_set, manifest.recipe, wanted_recipe)
        encoder = label_encoder(label_set, manifest)
        with (
            cpu_threads(manifest.recipe["threads"]),
            track("repair", len(_damaged_shards(found))) as progress,
        ):
            for shard, files in _damaged_shards(found).items():
                work = job.shard(manifest, encoder, shard)
                outcomes += [
                    _republished(label_set, manifest, wanted, work, "") for wanted in files
                ]
                progress.advance(1)
    except CacheError as error:  # of this set, or of the features that it is computed from
        known = {repair.path for repair in outcomes}
        outcomes += [repair for repair in _refused(found, str(error)) if repair.path not in known]
    return outcomes


def _republished(
    root: Path, manifest: CacheManifest, wanted: WantedObject, work: ShardData, changed: str
) -> Repair:
    if wanted.sha256 is None:
        note = "its record is damaged too, so nothing tells the right bytes; mend that first"
        return Repair(path=wanted.path, outcome="refused", note=note)
    array = manifest.arrays[wanted.array.name]
    content = build_shard(
        work.payloads[array.name], array.length, array.shard_rows * array.payloads_a_row
    )
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


def _hashes(
    root: Path, contents: Contents, work: ShardData
) -> Iterator[tuple[int, str | None, str | None]]:
    manifest = contents.manifest
    assert manifest is not None
    rows = next(iter(manifest.arrays.values())).rows_of(work.shard)
    known: Sequence[str | None] = []
    if work.shard in contents.records:
        known = contents.records[work.shard].content_sha256
    elif contents.keys is not None:
        column = read_table(root / SAMPLES)["content_sha256"]
        known = [
            value.hex() if value is not None else None
            for value in column[rows.start : rows.stop].to_pylist()
        ]
    return zip(rows, known, work.content_sha256, strict=False)
