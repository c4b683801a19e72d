"""The check of a cache with its label sets. Never writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dtcache.errors import CacheFormatError
from dtcache.options import VerifyOptions
from dtcache.store.contents import WantedObject, read_contents
from dtcache.store.label_sets import label_sets_among
from dtcache.store.layout import LABELS, MANIFEST
from dtcache.store.remote import Location
from dtcache.store.remote_files import remote_files
from dtcache.store.verify import (
    CheckedFiles,
    LocalFiles,
    Verification,
    chosen_objects,
    verify_contents,
)
from pipelines.terminal.progress import track


def verify_cache(location: Location, options: VerifyOptions) -> Verification:
    """Check a cache and its label sets: a share `options.fraction` of the shards, all other files.

    Raises CacheNotFoundError, CacheFormatError and CacheBusyError, and StorageError if an object
    store fails.
    """
    labels = {}
    unreadable = {}
    with _files(location) as files:
        names = label_sets_among(files.names())
        own = _verify_one(files, options)
    for name in names:
        try:
            with _files(_label_set(location, name)) as files:
                labels[name] = _verify_one(files, options)
        except CacheFormatError as error:
            unreadable[name] = str(error).rpartition(f"{MANIFEST}: ")[2]
    return replace(own, labels=labels, unreadable=unreadable)


def _label_set(location: Location, name: str) -> Location:
    if isinstance(location, Path):
        return location / LABELS / name
    return replace(location, address=f"{location.address}/{LABELS}/{name}")


@contextmanager
def _files(location: Location) -> Iterator[CheckedFiles]:
    if isinstance(location, Path):
        yield LocalFiles(location)
    else:
        with remote_files(location) as files:
            yield files


def _verify_one(files: CheckedFiles, options: VerifyOptions) -> Verification:
    """Check a cache or a label set, showing progress."""
    contents = read_contents(files.root)
    chosen = chosen_objects(contents, options.fraction, options.seed)
    done = 0
    with track("verify", len(chosen)) as progress:

        def on_object(wanted: WantedObject) -> None:
            nonlocal done
            done += wanted.size or 0
            progress.advance(1, f"{done / 2**20:.1f} MiB")

        return verify_contents(files, contents, chosen, on_object)
