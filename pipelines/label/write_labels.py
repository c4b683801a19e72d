"""`dtcache label write`: soft labels of every image and view of a cache, as a sealed part of it."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.atomic_files import FolderLock
from dtcache.cache.label_set import LabelSet
from dtcache.errors import CacheIncompleteError, CacheMismatchError
from dtcache.labels import load_interpreter
from dtcache.options import LabelWriteOptions
from dtcache.process_settings import cpu_threads
from dtcache.recipe import Json
from dtcache.store.label_sets import require_name
from dtcache.store.layout import LABELS, MANIFEST
from dtcache.store.manifest import read_manifest, require_same
from dtcache.store.summary import inspect_cache
from dtcache.store.writer import CacheWriter
from pipelines.label.label_quality import known_labels, measure
from pipelines.label.label_writer import LabelWriter
from pipelines.terminal.output import say

REMEDY = "use the same interpreter and options to resume it, or another `name`"


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenLabels:
    """A finished label set."""

    root: Path
    images: int
    share: float
    """Bytes of the label set over those of the features."""
    measured: Json
    """Result of `label_quality.measure` at the time when the set was sealed."""


def write_labels(root: Path, interpreter_dir: Path, options: LabelWriteOptions) -> WrittenLabels:
    """Write the soft labels of the cache `root` by an interpreter.

    A set that was begun with the same inputs and options is resumed. Raises CacheMismatchError,
    naming the difference, if the interpreter was fitted to other features or if the set was begun
    with other inputs; ConfigError; and what opening the cache or the interpreter raises.
    """
    require_name(options.name)
    interpreter = load_interpreter(interpreter_dir)
    out = root / LABELS / options.name
    labeller = LabelWriter(root, interpreter, options)
    begun = read_manifest(out).recipe if (out / MANIFEST).exists() else None
    if begun is not None:
        _require_same_inputs(out, begun, labeller.fixed_fields(), options)
    known = known_labels(labeller.cache, interpreter.spec, options)
    threads = begun["threads"] if begun is not None else None
    with FolderLock(out) as folder, cpu_threads(threads):
        writer = CacheWriter.resume(out) if begun is not None else labeller.create(out)
        folder.keep()
        if writer.manifest.state == "writing":
            labeller.write(writer)
            labels = LabelSet(labeller.cache, options.name, unfinished=True)
            writer.seal(measure(labeller.cache, labels, labeller.logits, known))
        else:
            writer.seal()  # removes the commit records that a kill during sealing has left
        measured = writer.manifest.measured
        if measured is None:
            raise CacheIncompleteError(
                f"{out}: sealed without measurements; delete this folder and write the labels again"
            )
        report = next(
            label_set
            for label_set in inspect_cache(root)["labels"]
            if label_set["name"] == options.name
        )
    if options.masks is not None and measured["agreement"] is None:
        say(
            f"warning: {out} was finished without masks, and its record of agreement stays empty; "
            "delete it and write it again to measure the agreement with these masks"
        )
    if report["share"] > options.share:
        say(
            f"warning: {out} takes {report['share']:.1%} of the features' bytes, over the "
            f"requested share of {options.share:.4g}; in a cache of few images, the files that "
            "every label set has take most of these bytes"
        )
    return WrittenLabels(
        root=out, images=report["num_done"], share=report["share"], measured=measured
    )


def _require_same_inputs(
    out: Path, begun: Json, fixed_fields: Json, options: LabelWriteOptions
) -> None:
    """Raise CacheMismatchError if a set was begun by another interpreter or with other options."""
    begun_ratio = begun["codec"]["ratio"]
    ratio = fixed_fields["codec"]["ratio"]
    if begun_ratio != ratio:
        share = options.share * ratio / begun_ratio
        raise CacheMismatchError(
            f"{out} was begun with `share={share:.4g}`, got `share={options.share:.4g}`; {REMEDY}"
        )
    require_same(out, begun, fixed_fields, remedy=REMEDY)
