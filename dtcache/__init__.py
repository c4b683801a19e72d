"""dtcache: cache a diffusion teacher's features once, train any number of students from them.

The names of `__all__` are the public interface. Each is imported when it is first used: `import
dtcache` loads no torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtcache._version import __version__

if TYPE_CHECKING:
    from dtcache.cache.batch import Batch
    from dtcache.cache.cache import Cache, CachedSample
    from dtcache.cache.cache_loader import CacheLoader
    from dtcache.cache.distillation_step import distillation_step
    from dtcache.errors import DtcacheError
    from dtcache.losses import Objective, Targets, at_loss, label_loss, make_objective, mse_loss
    from dtcache.options import ExtractOptions, InspectOptions, TrainOptions
    from dtcache.student import FeatureRegressor, build_student
    from dtcache.teacher.image_features import ImageTeacher, load_teacher
    from pipelines.library import extract, inspect, train
    from pipelines.terminal.listener import Progress

__all__ = [
    "Batch",
    "Cache",
    "CacheLoader",
    "CachedSample",
    "DtcacheError",
    "ExtractOptions",
    "FeatureRegressor",
    "ImageTeacher",
    "InspectOptions",
    "Objective",
    "Progress",
    "Targets",
    "TrainOptions",
    "__version__",
    "at_loss",
    "build_student",
    "distillation_step",
    "extract",
    "inspect",
    "label_loss",
    "load_teacher",
    "make_objective",
    "mse_loss",
    "open",
    "train",
]
_MODULES = {
    "dtcache.cache.batch": ("Batch",),
    "dtcache.cache.cache": ("Cache", "CachedSample"),
    "dtcache.cache.cache_loader": ("CacheLoader",),
    "dtcache.cache.distillation_step": ("distillation_step",),
    "dtcache.errors": ("DtcacheError",),
    "dtcache.losses": (
        "Objective",
        "Targets",
        "at_loss",
        "label_loss",
        "make_objective",
        "mse_loss",
    ),
    "dtcache.options": ("ExtractOptions", "InspectOptions", "TrainOptions"),
    "dtcache.student": ("FeatureRegressor", "build_student"),
    "dtcache.teacher.image_features": ("ImageTeacher", "load_teacher"),
    "pipelines.library": ("extract", "inspect", "train"),
    "pipelines.terminal.listener": ("Progress",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'dtcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted({*globals(), *__all__})


def open(path: str | Path, images: str | Path | None = None) -> "Cache":
    """Open a sealed cache for reading: a folder, or an address such as s3://bucket/cats.cache.

    `images` is the source that the cache was extracted from; it is needed for the images of a cache
    that does not store them. Features of a sample are fp32 (V, C, H, W) by array.

    Raises CacheNotFoundError, CacheIncompleteError or CacheDamagedError, and ImagesError if
    `images` is a different source. torch and the other libraries that reading needs are imported by
    this call, not by `import dtcache`.
    """
    from dtcache.arguments import path_of
    from dtcache.cache.cache import Cache
    from dtcache.store.remote import location_of

    source = None if images is None else path_of("images", images)
    return Cache(location_of("path", path), source)
