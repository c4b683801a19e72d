"""Training batches from one or several caches."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from dtcache.cache.batch import Rows, TrainBatch
from dtcache.cache.cache import Cache
from dtcache.cache.device_copies import Pinned, copied_ahead
from dtcache.cache.join import Join, JoinedTeacher, join, require_sealed
from dtcache.cache.joined_cache import JoinedCache, joined_name
from dtcache.cache.label_set import LabelledCache, LabelSet
from dtcache.cache.loader import EpochLoader
from dtcache.cache.selection import chosen_taps, split_rows
from dtcache.device import Compute
from dtcache.distributed import Processes
from dtcache.errors import ConfigError
from dtcache.losses.teachers import TeacherTargets
from dtcache.options import TrainOptions, parse_taps
from dtcache.recipe import Json
from dtcache.store.reader import Allowed
from dtcache.store.remote import Location
from dtcache.store.sample_index import Keys
from pipelines.terminal.output import say
from pipelines.train.batch_source import batching


class CachedSource:
    """A BatchSource over caches: teachers of the same images, or one teacher's parts."""

    def __init__(
        self,
        locations: Sequence[Location],
        options: TrainOptions,
        compute: Compute,
        processes: Processes,
    ) -> None:
        """Open the caches and join them.

        Raises the errors of opening a cache, CacheMismatchError if the caches do not belong
        together, and ConfigError if they cannot serve the options.
        """
        joined = open_join(locations, options)
        first = joined.sets[0].caches[0]
        self.labels: LabelSet | None = first.labels if isinstance(first, LabelledCache) else None
        self.label_decoder = self.labels.decoder().to(compute.device) if self.labels else None
        self._cache = JoinedCache(joined)
        self.view = self._cache.view
        self.identity = _identity(joined)
        if self.labels is not None:
            self.identity["label_set"] = self.labels.identity
        chosen = chosen_arrays(joined, options)
        self.teachers = tuple(
            _targets(teacher, self._cache, names)
            for teacher, names in zip(joined.teachers, chosen, strict=True)
        )
        usable = self._cache.usable
        if processes.is_first:
            for line in _remarks(joined, self._cache):
                say(line)
        limited = usable[: options.limit]
        rows, self._held = split_rows(limited, Keys(self._cache.keys, limited))
        self._loader = EpochLoader(
            Pinned(self._cache) if compute.device.type == "cuda" else self._cache,
            rows,
            self.names,
            batching(options, processes),
        )
        self._device = compute.device
        self._batch_size = options.batch_size
        self._decoder = self._cache.decoder(self.names).to(compute.device)

    @property
    def names(self) -> list[str]:
        """The arrays that are regressed: teacher by teacher, timestep by timestep."""
        return [name for teacher in self.teachers for name in teacher.names]

    @property
    def num_batches(self) -> int:
        """Global batches per epoch."""
        return self._loader.num_batches

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of an array's maps."""
        return self._cache.shape(name)

    def epoch(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        """Yield this process's micro-batches; a GPU copies the next one while it computes."""
        return copied_ahead(self._loader.epoch(epoch, start), self._device)

    def held_out(self) -> Iterator[TrainBatch]:
        """Yield the first view of each held-out sample: draw 0, not mirrored."""
        for start in range(0, len(self._held), self._batch_size):
            rows = self._held[start : start + self._batch_size].array()
            yield self._cache.batch(rows, [0] * len(rows), self.names)

    def ready(self, batch: TrainBatch) -> TrainBatch:
        """Return a batch on the device."""
        return batch.changed(lambda x: x.to(self._device))

    def decode(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return a batch's whitened features by array, fp32 (B, C, H, W)."""
        features: dict[str, Tensor] = self._decoder(batch)
        return features

    def keys(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the keys of samples."""
        return self._cache.keys(rows)


def open_join(locations: Sequence[Location], options: TrainOptions) -> Join:
    """Open caches and arrange them; each image set has a cache with images.

    Raises what `CachedSource` raises.
    """
    if not locations:
        raise ConfigError("`where`: expected one or more caches, got none; pass a cache")
    allow: Allowed = "incomplete" if options.allow_incomplete else "nothing"
    caches = [
        _open(location, options, allow, with_images=len(locations) == 1, is_first=number == 0)
        for number, location in enumerate(locations)
    ]
    if len(caches) > 1:
        require_sealed(caches)
    joined = join(caches)
    lacking = {
        id(images.caches[0])
        for images in joined.sets
        if not any(cache.has_images for cache in images.caches)
    }
    if len(caches) > 1 and options.images is not None:
        if not lacking:
            raise ConfigError(
                "`images`: expected caches without images, got caches that store theirs; leave "
                "`images` out"
            )
        caches = [
            _open(location, options, allow, with_images=True, is_first=number == 0)
            if id(cache) in lacking
            else cache
            for number, (location, cache) in enumerate(zip(locations, caches, strict=True))
        ]
        joined = join(caches)
    elif lacking:
        location = next(cache.reader.location for cache in caches if id(cache) in lacking)
        raise ConfigError(
            f"{location} stores no images; pass `images`, the images it was extracted from"
        )
    if options.labels is not None and len(joined.sets) > 1:
        raise ConfigError(
            "`labels`: expected caches of the same images, got parts of a teacher, whose label "
            "sets differ; train on one of them, or leave `labels` out"
        )
    if options.feature_weight == 0 and len(caches) > 1:
        raise ConfigError(
            "`feature_weight` 0: no feature is trained on; pass the cache of the labels alone"
        )
    return joined


def _open(
    location: Location,
    options: TrainOptions,
    allow: Allowed,
    *,
    with_images: bool,
    is_first: bool,
) -> Cache:
    """Open a cache: with the label set if it is the first one, with `images` if it needs them."""
    images = options.images if with_images else None
    if options.labels is not None and is_first:
        return LabelledCache(location, options.labels, images, allow=allow, reading=options.reading)
    return Cache(location, images, allow=allow, reading=options.reading)


def chosen_arrays(joined: Join, options: TrainOptions) -> list[list[str]]:
    """Return the arrays of each teacher that a student regresses, by their names in the cache.

    Of several teachers, each has those of `taps` that it knows, and `timestep` concerns those that
    take noise. Raises ConfigError for a tap that no teacher has, for a teacher that has none of
    them, and for a timestep that is not cached.
    """
    if len(joined.teachers) == 1:
        return [feature_names(joined.teachers[0].caches[0], options)]
    wanted = parse_taps(options.taps) if options.taps is not None else None
    arrays = []
    offered: set[str] = set()
    for teacher in joined.teachers:
        cache = teacher.caches[0]
        recipe = cache.recipe["teacher"]
        stored = [tap["name"] for tap in recipe["taps"]]
        taps = [tap for tap in stored if wanted is None or tap in wanted]
        offered |= {*stored}
        if not taps:
            raise ConfigError(
                f"`taps` {options.taps}: {cache.reader.location} has none of them, only "
                f"{', '.join(stored)}; pass one of these too"
            )
        takes_noise = any(alpha_bar < 1 for alpha_bar in recipe["alpha_bars"])
        timestep = options.timestep if takes_noise else None
        arrays.append(chosen_taps(cache, timestep=timestep, taps=",".join(taps)))
    unknown = [tap for tap in wanted or () if tap not in offered]
    if unknown:
        raise ConfigError(
            f"`taps` {unknown[0]}: no cache has this tap; pass some of {', '.join(sorted(offered))}"
        )
    return arrays


def feature_names(cache: Cache, options: TrainOptions) -> list[str]:
    """Return the arrays that a student regresses: none if the feature loss has weight 0."""
    chosen = chosen_taps(cache, timestep=options.timestep, taps=options.taps)
    return [] if options.feature_weight == 0 else chosen


def _targets(teacher: JoinedTeacher, joined: JoinedCache, chosen: Sequence[str]) -> TeacherTargets:
    """Return what is known of a teacher's arrays. Measurements are means over its caches' rows."""
    names = {joined_name(teacher, own_name): own_name for own_name in chosen}
    recipes = [cache.reader.manifest.recipe for cache in teacher.caches]
    rows = [len(cache.reader.usable) for cache in teacher.caches]

    def measured(kind: str) -> dict[str, float]:
        return {
            name: sum(
                count * float(recipe["codec"][kind][own_name])
                for count, recipe in zip(rows, recipes, strict=True)
            )
            / max(1, sum(rows))
            for name, own_name in names.items()
        }

    codec: Json = dict(recipes[0]["codec"])
    if any(recipe["codec"]["name"] != codec["name"] for recipe in recipes):
        codec["name"] = "several"
    codec["noise_share"] = measured("noise_share")
    crops = (recipes[0].get("equivariance") or {}).get("crop") or {}
    return TeacherTargets(
        name=teacher.name,
        names=tuple(names),
        architecture=recipes[0]["teacher"]["architecture"],
        weights_sha256=recipes[0]["teacher"]["weights_sha256"],
        fit=joined.fit(list(names)),
        codec=codec,
        noise_floor=measured("noise_floor"),
        crop_error={name: crops[own] for name, own in names.items() if own in crops},
    )


def _identity(joined: Join) -> Json:
    """Return the fields that identify the data of a run: hashes of the caches, by teacher."""
    if len(joined.teachers) == 1 and len(joined.sets) == 1:
        return joined.sets[0].caches[0].reader.data_identity
    return {
        "caches": {
            teacher.name: [cache.reader.data_identity for cache in teacher.caches]
            for teacher in joined.teachers
        }
    }


def _remarks(joined: Join, cache: JoinedCache) -> list[str]:
    """Return what a user should know about the samples of a join, as lines."""
    lines = []
    first = joined.sets[0].caches[0].reader
    if first.manifest.state != "sealed":
        lines.append(
            f"{first.location} is not complete: it has {len(cache.usable)} of "
            f"{first.manifest.num_samples} samples"
        )
    if len(joined.sets) > 1:
        counts = ", ".join(str(len(images.usable)) for images in joined.sets)
        lines.append(
            f"{len(joined.sets)} parts of other images, joined to {len(cache.usable)} samples "
            f"({counts})"
        )
    if cache.num_lacking:
        lines.append(
            f"{cache.num_lacking} samples are left out, as not every cache has features of them"
        )
    return lines
