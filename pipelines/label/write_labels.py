"""`dtcache label write`: an interpreter's soft labels of every image and view of a cache, as a sealed part of it."""

import sys
from dataclasses import dataclass
from pathlib import Path

from dtcache.atomic_files import FolderLock
from dtcache.cache.label_set import LabelSet
from dtcache.device import cpu_threads
from dtcache.errors import CacheMismatchError
from dtcache.labels import load_interpreter
from dtcache.options import LabelWriteOptions, parse_share
from dtcache.recipe import Json
from dtcache.store.label_sets import require_name
from dtcache.store.layout import LABELS, MANIFEST
from dtcache.store.manifest import read_manifest, require_same
from dtcache.store.summary import inspect_cache
from dtcache.store.writer import CacheWriter
from pipelines.label.label_quality import known_labels, measure
from pipelines.label.label_writer import LabelJob


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenLabels:
    """What came of writing."""

    root: Path
    images: int
    share: float
    """Bytes of the label set over those of the features."""
    measured: Json


SAME = "give the same interpreter and options to go on with it, or another --name"


def write_labels(root: Path, where: Path, options: LabelWriteOptions) -> WrittenLabels:
    """Write the soft labels of a cache by the interpreter in `where`; goes on with a set that was begun alike.

    Raises CacheMismatchError, naming the difference, where the interpreter was fitted to other features or the set is
    another one, ConfigError, and what opening either raises.
    """
    require_name(options.name)
    interpreter = load_interpreter(where)
    out = root / LABELS / options.name
    job = LabelJob(root, interpreter, options)
    begun = read_manifest(out).recipe if (out / MANIFEST).exists() else None
    if begun is not None:
        _require_begun_alike(out, begun, job.asked(), options)
    known = known_labels(job.cache, interpreter.spec, options)
    with FolderLock(out), cpu_threads(begun["threads"] if begun is not None else None):
        writer = CacheWriter.resume(out) if begun is not None else job.begin(out)
        if writer.manifest.state == "writing":
            job.write(writer)
            labels = LabelSet(job.cache, options.name, unfinished=True)
            writer.seal(measure(job.cache, labels, job.logits, known))
        else:
            writer.seal()  # the commit records that a kill in the middle of it has left
        assert writer.manifest.measured is not None, "a label set is sealed with it"
        if options.masks is not None and writer.manifest.measured["agreement"] is None:
            print(
                f"warning: --masks: {out} was finished without them, and what it records stays; delete it and write it "
                "again to know the agreement",
                file=sys.stderr,
            )
        report = next(
            found for found in inspect_cache(root)["labels"] if found["name"] == options.name
        )
    if report["share"] > parse_share(options.share, "share"):
        print(
            f"warning: {out} takes {report['share']:.1%} of the features' bytes, over the --share {options.share} "
            "asked for; what every label set has weighs most in a cache of few images",
            file=sys.stderr,
        )
    return WrittenLabels(
        root=out,
        images=report["num_done"],
        share=report["share"],
        measured=writer.manifest.measured,
    )


def _require_begun_alike(out: Path, begun: Json, asked: Json, options: LabelWriteOptions) -> None:
    """Raise CacheMismatchError where a set was begun by another interpreter or with other options."""
    there = begun["codec"]["ratio"]
    now = asked["codec"]["ratio"]
    if there != now:
        share = 100 * parse_share(options.share, "share") * now / there
        raise CacheMismatchError(
            f"{out} was begun with --share {share:.4g}%, got {options.share}; {SAME}"
        )
    require_same(out, begun, asked, remedy=SAME)
