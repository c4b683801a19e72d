"""Frozen types that cross a module border. Shape suffixes: B batch, C channels, H rows, W columns, N samples."""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from dtcache.hashing import canonical_json, sha256_json

Fit = Literal["crop", "stretch"]
ConditionKind = Literal["label", "class", "null", "prompt"]
CodecName = Literal["pca-dct-rans", "float16"]
Json = dict[str, Any]

FORMAT_VERSION = 1
MAX_VIEWS = 64
MAX_SIDE = 1 << 14
MAX_SHARD_ROWS = 1 << 20
MAX_SHARDS = 1_000_000
MAX_SAMPLES = 1 << 30
"""Bounds of a cache, which its writer keeps and its reader insists on."""
NOISE_SCHEME = "philox4x64-sha256-boxmuller-1"


def tap_name(timestep: int, tap: str) -> str:
    """Return the array of a tap at a timestep, such as t150/stride8."""
    return f"t{timestep}/{tap}"


def signal_to_noise(alpha_bar: float) -> float | None:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar), or None where there is no noise."""
    return alpha_bar / (1.0 - alpha_bar) if alpha_bar < 1.0 else None


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
    """One feature map of a teacher: a decoder level's before its upsampler, or a transformer block's tokens."""

    name: str
    """stride8, stride16, ...: the map's stride against the view; block6, ...: the transformer's block."""
    block: int
    """Index of the up block, coarsest first, or of the transformer block."""
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
class ConditionSpec:
    """What a conditional teacher is told of an image beside its noisy pixels."""

    kind: ConditionKind
    """label: the sample's own. class: one for all. null: that none is given. prompt: a text for all."""
    number: int | None = None
    """The class, where `kind` is class."""
    prompt: str | None = None
    """The text, where `kind` is prompt."""
    embedding_sha256: str | None = None
    """SHA-256 of the prompt's embedding: little-endian fp32 in C order, as prompt.safetensors holds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """What of the teacher the cached bytes depend on."""

    architecture: str
    """The diffusers class, such as UNet2DModel."""
    weights_sha256: str
    """SHA-256 of the weight file, or of the canonical JSON of the SHA-256s of several, by path."""
    config_sha256: str
    """SHA-256 of the canonical JSON of the model, scheduler and autoencoder configurations."""
    timesteps: tuple[int, ...]
    """Noise levels, in training steps of the scheduler."""
    alpha_bars: tuple[float, ...]
    """Share of the signal's variance left at each timestep; SNR = alpha_bar / (1 - alpha_bar)."""
    taps: tuple[TapSpec, ...]
    """The taps, finest first."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Autocast type of the forward pass."""
    batch_size: int
    """Every forward pass has exactly this many images: the batch shape moves results by ~4e-6 relative."""
    device_type: str
    """cpu or cuda: results differ in the last bits."""
    snrs: tuple[float | None, ...] | None = None
    """alpha_bar / (1 - alpha_bar) at each timestep, None where there is no noise; early caches leave it out."""
    ddim_steps: int | None = None
    """Steps of the deterministic DDIM inversion up to each timestep; None where the image is noised (DDPM)."""
    condition: ConditionSpec | None = None
    """What it is told beside the noisy image; None where it is unconditional."""
    compiled: bool | None = None
    """Whether torch.compile compiled the network, which moves results in their last bits; None where it did not."""


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
class Box:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivariance:
    """How far whitened features are from following the image when it is mirrored or cropped, and its noise with it.

    Each is a relative squared error by array, ||found - wanted||^2 / ||wanted||^2 over a few images, both whitened with
    the scalars of the whole image's map: 0 follows exactly, 2 is what unrelated maps of that size give.
    """

    images: int
    """Images measured: the first rows that can be decoded."""
    flip: dict[str, float]
    """Features of the mirrored image against the mirrored features."""
    box: Box | None
    """The crop in the view, aligned to the coarsest stride; None where the teacher takes no such size."""
    crop: dict[str, float] | None
    """Features of the cropped image against the features cropped by the same box."""
    crop_interior: dict[str, float] | None
    """The same over the middle of the crop alone, for the taps whose maps have one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpec:
    """What a set of soft labels is of; its recipe's teacher is the interpreter that gave them."""

    level: Literal["pixel", "image"]
    """Whether pixels are labelled, or images as a whole."""
    classes: tuple[str, ...]
    """Names by number."""
    views: int
    """Views of a row of the cache, which share a payload: its channels are views x classes."""
    cache_fingerprint: str
    """Of the cache whose features were read."""
    cache_samples: str
    """SHA-256 of that cache's samples.parquet: which images its rows are."""
    validation: dict[str, float | None] | None
    """Scores of the interpreter on masked images that it was not fitted to, by name; None where it has none."""


def check_scores(scores: Any) -> None:
    """Check how well labels were met: `images`, and the shares `miou` and `accuracy`, each None where it is not known.

    Raises KeyError, TypeError or ValueError for other values.
    """
    images = scores["images"]
    if isinstance(images, bool) or not isinstance(images, int) or not 0 < images < 2**63:
        raise ValueError(f"scores of {str(images)[:40]} images")
    for name in ("miou", "accuracy"):
        if scores[name] is not None:
            check_range(scores[name], 1)


def check_range(value: Any, most: float) -> None:
    """Raise ValueError where a recorded figure is no number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no number from 0 to {most:g}")


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
    equivariance: Equivariance | None = None
    """Measured before the first shard."""
    round_trip: dict[str, float] | None = None
    """By timestep, such as t150: ||x' - x||^2 / ||x||^2 of images x inverted and denoised back, with DDIM."""
    labels: LabelSpec | None = None
    """Of a set of soft labels alone: such a set is a cache of its own, inside the one that it labels."""

    @property
    def num_views(self) -> int:
        """Views a sample has: draws x flips, one after the other."""
        return (1 if self.average else self.draws) * (2 if self.flips else 1)

    def to_json(self) -> Json:
        """Return the recipe as JSON values.

        A field whose default is None came after format 1's first caches: it is left out where it is None, so that
        their fingerprints hold.
        """
        value: Json = json.loads(canonical_json(_without_later(self, asdict(self))))
        return value

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: with the same images it gives the same bytes on one machine type."""
        return sha256_json(self.to_json())


def _without_later(spec: Any, value: Json) -> Json:
    """Return a dataclass's fields by name, without those that are None by default and in fact."""
    kept = {
        f.name: value[f.name]
        for f in fields(spec)
        if f.default is not None or value[f.name] is not None
    }
    parts = {name: getattr(spec, name) for name in kept}
    return {
        name: _without_later(parts[name], v) if is_dataclass(parts[name]) else v
        for name, v in kept.items()
    }


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
    """Unique name: docs/images.md says how each kind of source makes it."""
    label: int | None = field(default=None)
    """Class index, where the source has classes."""
