"""The files of a cache: their names, and the arrays of payloads among them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dtcache.recipe import Recipe, tap_name
from dtcache.store.tag import TAG_BYTES, tag_seed

MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
FAILURES = "failures.parquet"
SHARDS = "shards.parquet"
COMMITS = "commits"
LOG = "extraction.log.json"
MAX_LOG_BYTES = 64 << 20
PROMPT = "prompt.safetensors"
CODEC = "codec.safetensors.zst"
"""The fitted arrays of the codec."""
CLUSTER_LOG = "cluster.log"
"""Output of Dask and of local workers in the last run that used them, for people to read."""
DATA = "data.zarr"
LABELS = "labels"
"""Folder of a cache's label sets, each laid out like a cache."""
LOGITS = "t0/logits"
"""The one tap of a label set. t0: an interpreter adds no noise, like a teacher at timestep 0."""
IMAGES = "images"


@dataclass(frozen=True, kw_only=True, slots=True)
class PayloadArray:
    """A uint8 array of padded payloads: (N, L), or (N, V, L) with one payload per view of a row."""

    name: str
    """Path in data.zarr: images, or t150 for the features of timestep 150."""
    fingerprint: str
    """Fingerprint of the cache, which the payloads' tags cover."""
    shape: tuple[int, ...]
    """The last axis is L, the bytes of one padded payload."""
    shard_rows: int
    """Rows per shard."""

    @property
    def length(self) -> int:
        """L: bytes of one padded payload."""
        return self.shape[-1]

    @property
    def tag_seed(self) -> int:
        """The checksum that the tags of the array's payloads continue."""
        return tag_seed(self.fingerprint, self.name)

    @property
    def payloads_per_row(self) -> int:
        """Payloads per row: V, or 1."""
        return math.prod(self.shape[1:-1])

    @property
    def num_shards(self) -> int:
        """Shards of the array."""
        return -(-self.shape[0] // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Return the rows that a shard holds; the last shard may have fewer."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.shape[0]))

    @property
    def around_shard(self) -> tuple[str, str]:
        """What stands before and after the number of a shard in the path of its file."""
        return f"{DATA}/{self.name}/c.", ".0" * (len(self.shape) - 1)

    def object_path(self, shard: int) -> str:
        """Return the path of a shard's file, relative to the cache folder."""
        before, after = self.around_shard
        return f"{before}{shard}{after}"


def tap_names(recipe: Recipe) -> list[str]:
    """Return the names of all taps, timestep by timestep, finest tap first."""
    return [tap_name(t, tap.name) for t in recipe.teacher.timesteps for tap in recipe.teacher.taps]


def payload_arrays(
    recipe: Recipe, image_bound: int, bounds: Mapping[str, int]
) -> dict[str, PayloadArray]:
    """Return all payload arrays by name.

    `image_bound`, and `bounds` by array of features, are upper bounds of the bytes per payload
    without its tag.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if recipe.store_images:
        shapes[IMAGES] = (recipe.num_samples, padded_length(image_bound))
    for name, bound in bounds.items():
        shapes[name] = (recipe.num_samples, recipe.num_views, padded_length(bound))
    return {
        name: PayloadArray(
            name=name,
            fingerprint=recipe.fingerprint,
            shape=shape,
            shard_rows=recipe.shard_rows,
        )
        for name, shape in shapes.items()
    }


def padded_length(bound: int) -> int:
    """Return L for payloads of at most `bound` bytes without the tag: a multiple of 16."""
    return -(-(TAG_BYTES + bound) // 16) * 16
