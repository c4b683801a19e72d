"""What `dtcache inspect` knows of a cache's label sets, from their manifests and the sizes of their files."""

from collections.abc import Mapping
from pathlib import Path

from dtcache.errors import CacheDamagedError, CacheFormatError
from dtcache.recipe import Json
from dtcache.store.label_sets import label_set_names
from dtcache.store.layout import LABELS, SAMPLES
from dtcache.store.manifest import read_manifest
from dtcache.store.sample_index import read_failures


def inspect_labels(root: Path, files: Mapping[str, int], feature_bytes: int) -> list[Json]:
    """Describe every label set; `files` gives the bytes of all files by path, `feature_bytes` what features take.

    One whose manifest is not as written, or a newer dtcache's, is said to be damaged, with the reason and no more.
    """
    found = []
    for name in label_set_names(root):
        folder = f"{LABELS}/{name}/"
        size = sum(count for path, count in files.items() if path.startswith(folder))
        about = {
            "name": name,
            "bytes": size,
            "share": size / feature_bytes if feature_bytes else None,
        }
        try:
            found.append({**about, **_described(root / LABELS / name)})
        except (CacheDamagedError, CacheFormatError) as error:
            found.append({**about, "state": "damaged", "reason": str(error)})
    return found


def _described(root: Path) -> Json:
    manifest = read_manifest(root)
    about = manifest.recipe.get("labels")
    sealed = manifest.state == "sealed"
    if about is None:
        raise CacheDamagedError(f"{root}: not a label set; delete this folder")
    measured = manifest.measured or {}
    return {
        "state": "complete" if sealed else "unfinished",
        "num_done": manifest.num_samples - len(read_failures(root / SAMPLES)) if sealed else None,
        "level": about["level"],
        "classes": about["classes"],
        "fingerprint": manifest.fingerprint,
        "interpreter": manifest.recipe["teacher"]["weights_sha256"],
        "validation": about["validation"],
        **{name: measured.get(name) for name in ("total_variation", "entropy", "agreement")},
    }
