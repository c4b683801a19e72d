"""Frozen types that cross a module border. Shape suffixes: B batch, C channels, H rows, W columns, N samples."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Fit = Literal["crop", "stretch"]
CodecName = Literal["pca-dct-rans", "float16"]
Json = dict[str, Any]

FORMAT_VERSION = 1
MAX_VIEWS = 64
MAX_SIDE = 1 << 14
MAX_SHARD_ROWS = 1 << 20
"""Bounds of a cache, which its writer keeps and its reader insists on."""
NOISE_SCHEME = "philox4x64-sha256-boxmuller-1"


def canonical_json(value: Any) -> bytes:
    """Return the one UTF-8 encoding of a JSON value that dtcache hashes: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """The deterministic geometry between an image file and what teacher and students see."""

    height: int
    """Rows of the view, pixels."""
    width: int
    """Columns of the view, pixels."""
    fit: Fit = "crop"
    """crop: resize the shorter side (antialiased bicubic), centre crop. stretch: resize both sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapSpec:
    """One decoder feature map of a teacher, before that level's upsampler."""

    name: str
    """stride8, stride16, ...: the map's stride against the view."""
    block: int
    """Index of the up block, coarsest first."""
    stride: int
    """View rows over map rows."""
    channels: int
    """Channels of the map."""
    height: int
    """Rows of the map."""
    width: int
    """Columns of the map."""

    @property
    def values(self) -> int:
        """Numbers in one sample's map."""
        return self.channels * self.height * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """What of the teacher the cached bytes depend on."""

    architecture: str
    """The diffusers class, such as UNet2DModel."""
    weights_sha256: str
    """SHA-256 over the weight files' bytes."""
    config_sha256: str
    """SHA-256 of the canonical JSON of the model and scheduler configurations."""
    timesteps: tuple[int, ...]
    """Noise levels, in training steps of the scheduler."""
    alpha_bars: tuple[float, ...]
    """Share of the signal's variance left at each timestep; SNR = alpha_bar / (1 - alpha_bar)."""
    taps: tuple[TapSpec, ...]
    """The taps, finest first."""
    precision: Literal["fp32", "bf16"]
    """Autocast type of the forward pass."""
    batch_size: int
    """Every forward pass has exactly this many images: the batch shape moves results by ~4e-6 relative."""
    device_type: str
    """cpu or cuda: results differ in the last bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSpec:
    """How features become bytes; the fitted numbers live in the store and are hashed into the recipe."""

    name: CodecName = "pca-dct-rans"
    """The codec family; a reader refuses one that it does not know."""
    whitening: Literal["sample-chw"] = "sample-chw"
    """LayerNorm, non-affine, a sample over (C, H, W)."""
    ratio: float | None
    """Target of fp16 bytes over all stored bytes but images; None where features are stored as float16."""
    step: float | None
    """Quantiser step of a band that the image determines fully, in units of the whitened feature; None for float16."""
    fit_rows: int
    """The fit read rows [0, fit_rows)."""
    fit_sha256: str
    """SHA-256 over the fitted arrays."""
    noise_share: dict[str, float]
    """By array: the share of the variance about the channel means that a second noise draw changes."""
    noise_floor: dict[str, float]
    """By array: that variance, a value of the uncompressed whitened map: the least MSE that its student can reach."""
    determined_error: dict[str, float]
    """By array: the codec's error in what the image determines over that part's variance, on the fit's rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a cache is a function of, but the images' bytes: samples.parquet has their hashes."""

    teacher: TeacherSpec
    view: ViewSpec
    codec: CodecSpec
    samples_sha256: str
    """SHA-256 of the ordered sample list: keys and labels."""
    num_samples: int
    """Rows of the cache."""
    flips: bool
    """Whether mirrored views are cached too: the odd ones."""
    draws: int = 1
    """Noise draws of each flip."""
    average: bool = False
    """Whether the draws are stored as one view, their mean, or as views of their own."""
    seed: int
    """Seed of the row order and of the noise."""
    shard_rows: int
    """Rows a shard holds, all arrays alike."""
    images: Literal["view", "none"] = "view"
    """Whether the view's own pixels are stored, or left to the source."""
    threads: int | None = None
    """CPU threads of each process that computed, whose number moves results in their last bits; None on a GPU."""
    noise: str = NOISE_SCHEME
    """How noise is made from (seed, key, timestep, draw, flip)."""

    @property
    def num_views(self) -> int:
        """Views a sample has: draws x flips, one after the other."""
        return (1 if self.average else self.draws) * (2 if self.flips else 1)

    def to_json(self) -> Json:
        """Return the recipe as JSON values."""
        value: Json = json.loads(canonical_json(asdict(self)))
        return value

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: with the same images it gives the same bytes on one machine type."""
        return sha256_json(self.to_json())


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedSample:
    """A sample that has a row but no features."""

    row: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a source."""

    index: int
    """Place in the source's own order."""
    key: str
    """Unique name: relative POSIX path, or the Parquet path column, or file:row."""
    label: int | None = field(default=None)
    """Class index, where the source has classes."""
