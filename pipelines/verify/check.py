"""The check of a cache with its label sets. Never writes."""

from dataclasses import replace
from pathlib import Path

from dtcache.errors import CacheFormatError
from dtcache.options import VerifyOptions
from dtcache.store.contents import WantedObject, read_contents
from dtcache.store.label_sets import label_set_names
from dtcache.store.layout import LABELS, MANIFEST
from dtcache.store.verify import Verification, chosen_objects, verify_contents
from pipelines.terminal.progress import track


def verify_cache(root: Path, options: VerifyOptions) -> Verification:
    """Check a cache and its label sets: a share `options.fraction` of the shards, all other files.

    Raises CacheNotFoundError, CacheFormatError and CacheBusyError.
    """
    labels = {}
    unreadable = {}
    for name in label_set_names(root):
        try:
            labels[name] = _verify_one(root / LABELS / name, options)
        except CacheFormatError as error:
            unreadable[name] = str(error).removeprefix(f"{root / LABELS / name / MANIFEST}: ")
    return replace(_verify_one(root, options), labels=labels, unreadable=unreadable)


def _verify_one(root: Path, options: VerifyOptions) -> Verification:
    """Check a cache or a label set, showing progress."""
    contents = read_contents(root)
    chosen = chosen_objects(contents, options.fraction, options.seed)
    done = 0
    with track("verify", len(chosen)) as progress:

        def on_object(wanted: WantedObject) -> None:
            nonlocal done
            done += wanted.size or 0
            progress.advance(1, f"{done / 2**20:.1f} MiB")

        return verify_contents(root, contents, chosen, on_object)
