"""Repairs a cache and its label sets: recomputes damaged files, writes only the recorded bytes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dtcache.atomic_files import FolderLock, make_folders, require_no_links, write_file
from dtcache.cache.fitted_codec import load_fit
from dtcache.codec import FeatureEncoder
from dtcache.errors import CacheDamagedError, CacheError
from dtcache.hashing import file_problem, file_sha256
from dtcache.images import load_views, open_source
from dtcache.labels import Interpreter, load_interpreter
from dtcache.options import LabelWriteOptions, VerifyOptions
from dtcache.process_settings import cpu_threads
from dtcache.store.commits import ShardObject
from dtcache.store.contents import WantedObject, read_contents
from dtcache.store.label_sets import label_set_names
from dtcache.store.layout import FAILURES, LABELS, SAMPLES, SHARDS
from dtcache.store.manifest import CacheManifest, require_same
from dtcache.store.parquet_tables import parquet_bytes, read_table
from dtcache.store.pending_shard import ShardData
from dtcache.store.sample_index import SCHEMA, failures_table, read_samples
from dtcache.store.shard import build_shard
from dtcache.store.shard_index import shards_table
from dtcache.store.verify import Verification
from dtcache.store.zarr_nodes import zarr_nodes
from pipelines.extract.begun_cache import BegunCache, require_same_recipe
from pipelines.extract.fit_codec import fit_rows
from pipelines.extract.plan import ExtractionPlan, plan_rows
from pipelines.extract.shard import packed_rows, shard_data
from pipelines.extract.shard_runner import decode_threads
from pipelines.label.label_writer import LabelWriter, label_encoder
from pipelines.make_teacher import cache_teacher, options_from_recipe
from pipelines.terminal.progress import track
from pipelines.verify.check import verify_cache
from pipelines.verify.plan_repairs import Repair, remedy, repairable, start_over

OTHER_BYTES = (
    "the recomputed bytes do not have the recorded SHA-256, so they were not written; repair on "
    "the type of machine and with the versions that wrote the file (for an extraction, they are "
    "in extraction.log.json), or write everything again"
)


def repair_cache(root: Path, options: VerifyOptions) -> tuple[Verification, list[Repair]]:
    """Verify a cache and its label sets under their locks, and recompute what is damaged.

    Features come before labels, which are computed from them. Returns the verification without the
    repaired damage, and the outcome for each damaged file. Raises CacheBusyError if another process
    writes the cache or a label set, CacheMismatchError or ConfigError if images or teacher are not
    those of the extraction, ConfigError if the interpreter cannot be loaded, DiskError, and what
    `verify_cache` raises.
    """
    read_contents(root)  # raises if there is no cache; taking the lock would create the folder
    interpreter = load_interpreter(options.interpreter) if options.interpreter is not None else None
    with ExitStack() as locks:
        for folder in (root, *(root / LABELS / name for name in label_set_names(root))):
            locks.enter_context(FolderLock(folder))
        require_no_links(root, folders_only=True)
        verification = verify_cache(root, options)
        features = partial(_recompute_features, options=options)
        logits = partial(_recompute_labels, cache=root, interpreter=interpreter)
        left, repairs = _repair_one(root, verification, None, features)
        labels = {}
        for name, of_set in verification.labels.items():
            labels[name], set_repairs = _repair_one(root / LABELS / name, of_set, name, logits)
            repairs += [
                replace(repair, path=f"{LABELS}/{name}/{repair.path}") for repair in set_repairs
            ]
        return replace(left, labels=labels), repairs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Damaged:
    """A cache, or one of its label sets, with an intact manifest and damage in other files."""

    root: Path
    label_set: str | None
    """None for the cache itself."""
    manifest: CacheManifest
    verification: Verification

    def shards(self) -> dict[int, list[WantedObject]]:
        """Return the damaged files of each shard that has one."""
        by_path = {wanted.path: wanted for wanted in self.verification.contents.objects}
        damaged = dict[int, list[WantedObject]]()
        for damage in self.verification.damage:
            if damage.shard is not None:
                damaged.setdefault(damage.shard, []).append(by_path[damage.path])
        return damaged

    def refuse_shards(self, note: str) -> list[Repair]:
        """Return a refusal with the same `note` for every damaged shard file."""
        return [
            Repair(path=damage.path, outcome="refused", note=note)
            for damage in self.verification.damage
            if damage.shard is not None
        ]

    def write_shard(
        self, wanted: WantedObject, shard: ShardData, mismatch: str = OTHER_BYTES
    ) -> Repair:
        """Write one array's file of a recomputed shard if it has the recorded SHA-256."""
        if wanted.sha256 is None:
            note = "the record of its SHA-256 is damaged too; repair that file first"
            return Repair(path=wanted.path, outcome="refused", note=note)
        array = self.manifest.arrays[wanted.array.name]
        content = build_shard(array, shard.shard, shard.payloads[array.name])
        return self.write(wanted.path, content, wanted.sha256, mismatch)

    def write(
        self, path: str, content: bytes, sha256: str | None, mismatch: str = OTHER_BYTES
    ) -> Repair:
        """Write a file if `content` has the recorded SHA-256; else refuse with note `mismatch`."""
        if sha256 is None or hashlib.sha256(content).hexdigest() != sha256:
            return Repair(path=path, outcome="refused", note=mismatch)
        make_folders((self.root / path).parent)
        write_file(self.root / path, content)
        problem = file_problem(self.root / path, sha256)
        if problem is not None:
            note = f"written, but the disk returns other bytes ({problem}); check the disk"
            return Repair(path=path, outcome="refused", note=note)
        return Repair(path=path, outcome="repaired", note="it has the recorded SHA-256")


def _repair_one(
    root: Path,
    verification: Verification,
    label_set: str | None,
    recompute: Callable[[_Damaged], list[Repair]],
) -> tuple[Verification, list[Repair]]:
    """Repair the cache or the label set at `root`; `recompute` repairs its damaged shard files.

    Returns the verification without the repaired damage, and the outcome for each damaged file.
    """
    repairs = [
        Repair(path=damage.path, outcome="impossible", note=remedy(damage, label_set))
        for damage in verification.damage
        if not repairable(damage)
    ]
    manifest = verification.contents.manifest
    if manifest is not None:
        damaged = _Damaged(
            root=root, label_set=label_set, manifest=manifest, verification=verification
        )
        repairs += _rebuild_indices(damaged)
        if damaged.shards():
            repairs += recompute(damaged)
    repaired = {repair.path for repair in repairs if repair.outcome == "repaired"}
    left = tuple(damage for damage in verification.damage if damage.path not in repaired)
    return replace(verification, damage=left), repairs


def _rebuild_indices(damaged: _Damaged) -> list[Repair]:
    """Rebuild Zarr nodes, the failed rows and the shard index from the intact files."""
    manifest = damaged.manifest
    paths = [
        damage.path
        for damage in damaged.verification.damage
        if damage.shard is None and repairable(damage)
    ]
    contents = {}
    if any(path not in (FAILURES, SHARDS) for path in paths):
        contents = zarr_nodes(manifest.arrays.values())
    if SHARDS in paths and not damaged.shards():
        # The recorded hash of the index proves that every shard file is the recorded one.
        contents[SHARDS] = parquet_bytes(shards_table(_objects_on_disk(damaged)))
    damaged_paths = {damage.path for damage in damaged.verification.damage}
    if FAILURES in paths and SAMPLES not in damaged_paths:
        samples = read_table(damaged.root / SAMPLES, SCHEMA)
        contents[FAILURES] = parquet_bytes(failures_table(samples))
    repairs = []
    for path in paths:
        if path in contents:
            repairs.append(damaged.write(path, contents[path], manifest.files.get(path)))
        else:
            note = (
                "the files that it is rebuilt from are damaged too; "
                f"{start_over(damaged.label_set)}"
            )
            repairs.append(Repair(path=path, outcome="refused", note=note))
    return repairs


def _objects_on_disk(damaged: _Damaged) -> Iterator[tuple[int, ShardObject]]:
    """Yield the shard number of every shard file, and a record of the file as it is on disk."""
    for wanted in damaged.verification.contents.objects:
        path = damaged.root / wanted.path
        size = path.stat().st_size
        yield wanted.shard, ShardObject(path=wanted.path, size=size, sha256=file_sha256(path))


def _recompute_features(damaged: _Damaged, options: VerifyOptions) -> list[Repair]:
    """Recompute the damaged shards of features as the extraction did, and write their files."""
    root = damaged.root
    manifest = damaged.manifest
    if options.images is None or options.teacher is None:
        return damaged.refuse_shards("pass `images` and `teacher`, from which it is computed")
    try:
        fit = load_fit(root, manifest)
    except CacheDamagedError as error:
        return damaged.refuse_shards(str(error))
    plan = plan_rows(
        open_source(options.images, options, track),
        cache_teacher(root, manifest, options.teacher),
        options_from_recipe(manifest.recipe, options.teacher),
    )
    fixed = plan.fixed_recipe()
    del fixed["codec"]  # the cache's own fit is used
    require_same_recipe(BegunCache(root=root, manifest=manifest), fixed, plan.samples)
    encoder = FeatureEncoder(fit, plan.teacher.device)
    shards = damaged.shards()
    num_rows = sum(len(manifest.rows_of(shard)) for shard in shards)
    repairs = list[Repair]()
    with cpu_threads(plan.options.threads), track("repair", num_rows) as progress:
        for shard, files in shards.items():
            rows = manifest.rows_of(shard)
            indices = (plan.samples[row].index for row in rows)
            threads = decode_threads(plan.teacher.device)
            views = load_views(plan.source, indices, plan.view, threads=threads)
            packed = list(packed_rows(plan, encoder, rows, views, progress.advance))
            work = shard_data(plan, shard, rows, packed, fit_rows(len(plan.samples)))
            mismatch = OTHER_BYTES
            changed = _first_changed_image(damaged, plan, work)
            if changed is not None:
                mismatch = (
                    f"image {changed} has changed since the extraction, so nothing was written; "
                    "pass the images of the extraction"
                )
            repairs += [damaged.write_shard(wanted, work, mismatch) for wanted in files]
    return repairs


def _first_changed_image(damaged: _Damaged, plan: ExtractionPlan, work: ShardData) -> str | None:
    """Return the key of the first image of a shard whose bytes are not those that were cached."""
    rows = damaged.manifest.rows_of(work.shard)
    cached = _cached_hashes(damaged, work.shard, rows)
    for row, known, now in zip(rows, cached, work.content_sha256, strict=False):
        if known != now:
            return plan.samples[row].key
    return None


def _cached_hashes(damaged: _Damaged, shard: int, rows: range) -> Sequence[str | None]:
    """Return the recorded SHA-256 of a shard's images; empty if its records are damaged."""
    contents = damaged.verification.contents
    if shard in contents.records:
        return contents.records[shard].content_sha256
    if contents.keys is None:
        return ()
    column = read_samples(damaged.root, damaged.manifest).take(rows)["content_sha256"]
    return [value.hex() if value is not None else None for value in column.to_pylist()]


def _recompute_labels(
    damaged: _Damaged, cache: Path, interpreter: Interpreter | None
) -> list[Repair]:
    """Recompute damaged shards of a label set from the cache's features, and write their files."""
    manifest = damaged.manifest
    teacher = manifest.recipe["teacher"]
    if interpreter is None or interpreter.weights_sha256 != teacher["weights_sha256"]:
        return damaged.refuse_shards(
            "pass `interpreter`, the one that wrote the label set, with weights of SHA-256 "
            f"{teacher['weights_sha256'][:16]}..."
        )
    repairs = list[Repair]()
    shards = damaged.shards()
    try:
        options = LabelWriteOptions(
            name=damaged.root.name, batch_size=teacher["batch_size"], device=teacher["device_type"]
        )
        job = LabelWriter(cache, interpreter, options)
        wanted_recipe = job.fixed_fields()
        del wanted_recipe["codec"]  # the set's own fit is used
        require_same(damaged.root, manifest.recipe, wanted_recipe)
        encoder = label_encoder(damaged.root, manifest)
        with (
            cpu_threads(manifest.recipe["threads"]),
            track("repair", len(shards)) as progress,
        ):
            for shard, files in shards.items():
                work = job.shard(manifest, encoder, shard)
                repairs += [damaged.write_shard(wanted, work) for wanted in files]
                progress.advance(1)
    except CacheError as error:  # of this label set, or of the features that it is computed from
        done = {repair.path for repair in repairs}
        repairs += [
            refused for refused in damaged.refuse_shards(str(error)) if refused.path not in done
        ]
    return repairs
