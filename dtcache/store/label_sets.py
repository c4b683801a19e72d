"""The label sets of a cache: folders labels/NAME/, each laid out like a cache."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dtcache.errors import ConfigError, UnknownLabelsError
from dtcache.recipe import MAX_VIEWS, Json, check_range, check_scores
from dtcache.store.layout import LABELS, LOGITS, MANIFEST

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LEVELS = ("pixel", "image")
MAX_ENTROPY = 64
"""Maximum entropy in bits: more than any number of classes can reach."""


def label_set_names(root: Path) -> list[str]:
    """Return the names of a cache's label sets, finished or not, in order."""
    return sorted(path.parent.name for path in (root / LABELS).glob(f"*/{MANIFEST}"))


def label_sets_among(paths: Iterable[str]) -> list[str]:
    """Return the names of the label sets that have a manifest among a cache's paths, in order."""
    parts = (path.split("/") for path in paths)
    return sorted(p[1] for p in parts if len(p) == 3 and (p[0], p[2]) == (LABELS, MANIFEST))


def label_set_root(root: Path, name: str) -> Path:
    """Return the folder of a label set. Raises UnknownLabelsError with the existing names."""
    require_label_set(str(root), name, label_set_names(root))
    return root / LABELS / name


def require_label_set(cache: str, name: str, names: list[str]) -> None:
    """Raise UnknownLabelsError unless a label set is one of the cache's `names`."""
    if name not in names:
        have = (
            f"it has {', '.join(names)}"
            if names
            else "it has none; dtcache label write creates one"
        )
        raise UnknownLabelsError(f"{cache}: no label set {name[:64]!r}; {have}")


def require_name(name: str) -> None:
    """Raise ConfigError if a name is not valid for a label set."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"`name` {name[:80]!r}: expected up to 64 lower-case letters, digits, dots, dashes and "
            "underscores, such as parts-20"
        )


def check_labels(labels: Json, arrays: list[str], taps: list[Json]) -> None:
    """Check the `labels` of a recipe. Raises KeyError, TypeError or ValueError."""
    classes = labels["classes"]
    views = labels["views"]
    valid = (
        labels["level"] in LEVELS
        and isinstance(classes, list)
        and all(isinstance(c, str) for c in classes)
    )
    valid = valid and isinstance(views, int) and 0 < views <= MAX_VIEWS and arrays == [LOGITS]
    if not valid or taps[0]["channels"] != views * len(classes):
        raise ValueError(f"labels {str(labels)[:120]} in {arrays}")
    if not all(isinstance(labels[name], str) for name in ("cache_fingerprint", "cache_samples")):
        raise ValueError("labels without the hashes of their cache")
    if labels["validation"] is not None:
        check_scores(labels["validation"])


def check_measured(measured: Any) -> None:
    """Check the quality measures of a label set in its manifest; None stands for none.

    Raises KeyError, TypeError or ValueError if they are not valid.
    """
    if measured is None:
        return
    check_range(measured["total_variation"], 1)
    check_range(measured["entropy"], MAX_ENTROPY)
    if measured["agreement"] is not None:
        check_scores(measured["agreement"])
