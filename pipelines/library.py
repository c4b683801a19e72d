"""The verbs as Python functions: keywords or options, results as dataclasses, nothing printed.

They call the same functions as the command line, which makes options of flags and prints.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dtcache.arguments import path_of, require
from dtcache.errors import ConfigError
from dtcache.options import ExtractOptions, InspectOptions, Options, TrainOptions
from pipelines.extract.extract import Extracted
from pipelines.inspect.inspect import Inspected
from pipelines.terminal.listener import Listener, listening
from pipelines.train.student_run import Trained

Verb = TypeVar("Verb", bound=Options)


def extract(
    images: str | Path,
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    progress: Listener | None = None,
    **fields: Any,
) -> Extracted:
    """Cache a teacher's features of `images` in `out`, or resume that cache. Nothing is printed.

    Pass `options`, or its fields as keywords, such as `teacher="google/ddpm-cat-256"`. `progress`
    is called with messages and with the number of images done. Returns the numbers of images with
    and without features, and seconds. Raises ConfigError with the field's name for bad options, and
    the DtcacheError of whatever fails.
    """
    from pipelines.extract.extract import extract as run

    options = _options(ExtractOptions, options, fields)
    with listening(progress):
        return run(path_of("images", images), path_of("out", out), options)


def train(
    where: str | Path | Sequence[str | Path],
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    progress: Listener | None = None,
    **fields: Any,
) -> tuple[Trained, ...]:
    """Train students on the cache `where` and export their backbones. Nothing is printed.

    `where` may be a list of caches: teachers of the same images, or parts of one teacher.
    Pass `options`, or its fields as keywords, such as `student="resnet50", epochs=10`. One student
    is written to `out`; each of several, separated by commas, to `out/<student>`. `progress` is
    called with messages and with the number of steps done. Returns for each student its folder,
    steps, held-out loss (mean over samples) and the share of time spent waiting, 0 to 1. Raises
    ConfigError with the field's name for bad options, and the DtcacheError of whatever fails.
    """
    from dtcache.store.remote import location_of
    from pipelines.train.shared_loader import runs_of
    from pipelines.train.train import train_shared

    options = _options(TrainOptions, options, fields)
    runs = runs_of(path_of("out", out), options)
    several = [where] if isinstance(where, str | Path) else where
    require("where", several, Iterable, "a cache or a list of caches")
    locations = [location_of("where", location) for location in several]
    with listening(progress):
        return tuple(train_shared(locations, runs))


def inspect(
    *roots: str | Path,
    options: InspectOptions | None = None,
    progress: Listener | None = None,
    **fields: Any,
) -> Inspected:
    """Describe caches or runs, as `dtcache inspect` does. Nothing is printed.

    Pass `options`, or its fields as keywords, such as `stats=True`. Returns one report per root, in
    plain JSON types (sizes in bytes). Raises ConfigError with the field's name for bad options, and
    the CacheError of a path that is no readable cache or run.
    """
    from dtcache.store.remote import location_of
    from pipelines.inspect.inspect import inspect as run

    if not roots:
        raise ConfigError("`roots`: expected one or more caches or runs; pass their paths")
    options = _options(InspectOptions, options, fields)
    with listening(progress):
        return run([location_of("roots", root) for root in roots], options)


def _options(kind: type[Verb], options: Verb | None, fields: dict[str, Any]) -> Verb:
    """Return the options, or make them of keywords. Raises ConfigError with the field's name."""
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"`{name}`: expected a field of {kind.__name__}; pass one of {', '.join(known)}"
            )
    if options is None:
        try:
            return kind(**fields)
        except TypeError as error:
            raise ConfigError(f"{kind.__name__}: {error}; pass every required field") from error
    if fields:
        raise ConfigError(
            f"`{next(iter(fields))}`: expected `options` or keywords, got both; pass one of them"
        )
    if not isinstance(options, kind):
        raise ConfigError(
            f"`options`: expected {kind.__name__}, got {type(options).__name__}; pass "
            f"{kind.__name__}(...), or its fields as keywords"
        )
    return options
