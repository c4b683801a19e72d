"""The recipe of a cache and its parts: frozen types of all that the cached bytes depend on."""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from dtcache.hashing import canonical_json, sha256_json

ResizeMode = Literal["crop", "stretch"]
ConditionKind = Literal["label", "class", "null", "prompt"]
CodecName = Literal["pca-dct-rans", "float16"]
Json = dict[str, Any]

FORMAT_VERSION = 2
MAX_VIEWS = 64
MAX_SIDE = 1 << 14
MAX_SHARD_ROWS = 1 << 20
MAX_SHARDS = 1_000_000
MAX_SAMPLES = 1 << 30
"""Bounds of a cache: the writer keeps them, and the reader refuses a cache outside them."""
NOISE_SCHEME = "philox4x64-sha256-boxmuller-1"


def tap_name(timestep: int, tap: str) -> str:
    """Return the name of a tap at a timestep, such as t150/stride8."""
    return f"t{timestep}/{tap}"


def array_of(name: str) -> str:
    """Return the array that holds a tap of `tap_name`, such as t150: all taps of its timestep."""
    return name.partition("/")[0]


def signal_to_noise(alpha_bar: float) -> float | None:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar); None without noise."""
    return alpha_bar / (1.0 - alpha_bar) if alpha_bar < 1.0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """The view of an image that teacher and students see: a deterministic resize and crop."""

    height: int
    """Rows of the view, in pixels."""
    width: int
    """Columns of the view, in pixels."""
    resize_mode: ResizeMode = "crop"
    """crop: resize the shorter side (antialiased bicubic), then crop the centre.

    stretch: resize both sides.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class TapSpec:
    """One feature map of a teacher.

    A U-Net's tap is the output of a decoder level before its upsampler, or of one of the level's
    layers; a transformer's is the tokens of a block; a CNN's is the output of a stage.
    """

    name: str
    """stride8, ... of a level by its stride in the view; up2layer0, ... of its layers; mid of the
    middle block; or block6, ... of a transformer.
    """
    block: int
    """Index of the up block (the coarsest is 0; the middle is -1), transformer block or stage."""
    stride: int
    """Rows of the view divided by rows of the map."""
    channels: int
    """Channels of the map."""
    height: int
    """Rows of the map."""
    width: int
    """Columns of the map."""
    layer: int | None = None
    """Index of the layer, a residual block and its attention; None if the tap ends its block."""

    @property
    def values(self) -> int:
        """Values in the map of one sample and view."""
        return self.channels * self.height * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionSpec:
    """The condition that a conditional teacher receives beside the noisy image."""

    kind: ConditionKind
    """label: each sample's own label; class: one class; null: the null condition; prompt: one text.
    """
    number: int | None = None
    """The class, if `kind` is class."""
    prompt: str | None = None
    """The text, if `kind` is prompt."""
    embedding_sha256: str | None = None
    """SHA-256 of the prompt's embedding in prompt.safetensors: little-endian fp32 in C order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSpec:
    """Everything about the teacher that the cached bytes depend on."""

    architecture: str
    """The diffusers class, such as UNet2DModel, or timm: and the name of a timm network."""
    weights_sha256: str
    """SHA-256 of the weight file.

    For several files, SHA-256 of the canonical JSON of their hashes by path.
    """
    config_sha256: str
    """SHA-256 of the canonical JSON of the model, scheduler and autoencoder configurations."""
    timesteps: tuple[int, ...]
    """Noise levels, as training steps of the scheduler."""
    alpha_bars: tuple[float, ...]
    """Fraction of the signal's variance left at each timestep."""
    taps: tuple[TapSpec, ...]
    """The taps, finest first."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Autocast dtype of the forward pass."""
    batch_size: int
    """Images in every forward pass. The batch shape changes results by about 4e-6 relative."""
    device_type: str
    """cpu or cuda. Their results differ in the last bits."""
    snrs: tuple[float | None, ...] | None = None
    """SNR = alpha_bar / (1 - alpha_bar) at each timestep; None without noise.

    Early caches lack this field.
    """
    ddim_steps: int | None = None
    """Steps of the DDIM inversion up to each timestep; None if noise is added instead (DDPM)."""
    condition: ConditionSpec | None = None
    """The condition of each forward pass; None if the teacher is unconditional."""
    compiled: bool | None = None
    """True if torch.compile compiled the network, which changes results in the last bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSpec:
    """How features become bytes. The store holds the fitted arrays; the recipe holds their hash."""

    name: CodecName = "pca-dct-rans"
    """The codec family. A reader refuses a family that it does not know."""
    whitening: Literal["sample-chw"] = "sample-chw"
    """sample-chw: non-affine LayerNorm over (C, H, W) of each sample."""
    ratio: float | None
    """Target ratio of fp16 bytes to all stored bytes except images; None for float16 features."""
    step: float | None
    """Quantiser step of a band without noise, in units of the whitened feature; None for float16.
    """
    fit_rows: int
    """The codec was fitted on rows [0, fit_rows)."""
    fit_sha256: str
    """SHA-256 of the fitted arrays."""
    noise_share: dict[str, float]
    """By array: the share of the variance about channel means that a second noise draw changes."""
    noise_floor: dict[str, float]
    """By array: the variance that a second noise draw changes, per value of the whitened map.

    No student that sees only the image can have a smaller MSE.
    """
    determined_error: dict[str, float]
    """By array: the codec's squared error in the determined part, over that part's variance.

    The determined part is the part that the image alone determines. The error is measured on the
    rows of the fit.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A rectangle of pixels in the view."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivariance:
    """How closely whitened features follow the image when image and noise are mirrored or cropped.

    Each number is a relative squared error by array: ||f(T x) - T f(x)||^2 / ||T f(x)||^2 over a
    few images x, where T mirrors or crops; both maps are whitened with the mean and deviation of
    the whole image's map. 0 means that features follow exactly; unrelated maps of that size give 2.
    """

    images: int
    """Images measured: the first rows whose images can be decoded."""
    flip: dict[str, float]
    """Features of the mirrored image against the mirrored features."""
    box: Box | None
    """The crop, on the grid of the coarsest stride; None if the teacher does not take its size."""
    crop: dict[str, float] | None
    """Features of the cropped image against the features cropped by the same box."""
    crop_interior: dict[str, float] | None
    """The same over the middle of the crop alone, for taps whose maps are large enough for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpec:
    """The classes of a set of soft labels, and the cache that it labels.

    The teacher in the recipe of a label set is the interpreter that predicted the labels.
    """

    level: Literal["pixel", "image"]
    """pixel: every pixel has a label. image: each image has one."""
    classes: tuple[str, ...]
    """Class names by class index."""
    views: int
    """Views per row of the cache, which share one payload of views x classes channels."""
    cache_fingerprint: str
    """Fingerprint of the cache whose features the interpreter read."""
    cache_samples: str
    """SHA-256 of that cache's samples.parquet, which lists the image of each row."""
    validation: dict[str, float | None] | None
    """Scores by name on masked images that the interpreter was not fitted to; None without any."""


def check_scores(scores: Any) -> None:
    """Check scores: `images`, and `miou` and `accuracy`, each a fraction or None.

    Raises KeyError, TypeError or ValueError if the values are not valid.
    """
    images = scores["images"]
    if isinstance(images, bool) or not isinstance(images, int) or not 0 < images < 2**63:
        raise ValueError(f"scores of {str(images)[:40]} images")
    for name in ("miou", "accuracy"):
        if scores[name] is not None:
            check_range(scores[name], 1)


def check_range(value: Any, most: float) -> None:
    """Raise ValueError if a recorded value is not a number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{str(value)[:40]} is not a number from 0 to {most:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a cache is a function of, except the images' bytes.

    The hashes of the images' bytes are in samples.parquet.
    """

    teacher: TeacherSpec
    view: ViewSpec
    codec: CodecSpec
    samples_sha256: str
    """SHA-256 of the ordered sample list: keys and labels."""
    num_samples: int
    """Rows of the cache."""
    flips: bool
    """Whether mirrored views are cached too: the views with an odd index."""
    draws: int = 1
    """Noise draws per image orientation."""
    average: bool = False
    """Whether the mean of the draws is stored as one view, instead of one view per draw."""
    seed: int
    """Seed of the row order and of the noise."""
    shard_rows: int
    """Rows per shard, in all arrays."""
    store_images: bool = True
    """Whether the pixels of the view are stored. Otherwise they stay in the source of the images.
    """
    threads: int | None = None
    """CPU threads per process. Their number changes results in the last bits; None on a GPU."""
    noise: str = NOISE_SCHEME
    """How noise is generated from (seed, key, timestep, draw, flip)."""
    equivariance: Equivariance | None = None
    """Measured before the first shard is written."""
    round_trip: dict[str, float] | None = None
    """By timestep, such as t150: ||x' - x||^2 / ||x||^2 of images after a DDIM round trip.

    An image x is inverted and denoised again to x'.
    """
    labels: LabelSpec | None = None
    """Set only for a set of soft labels, which is a cache inside the cache that it labels."""

    @property
    def num_views(self) -> int:
        """Views per sample: draws x flips."""
        return (1 if self.average else self.draws) * (2 if self.flips else 1)

    def to_json(self) -> Json:
        """Return the recipe as JSON values, by `spec_json`."""
        return spec_json(self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON.

        On one type of machine, recipe and images determine the bytes of a cache.
        """
        return sha256_json(self.to_json())


def spec_json(spec: Any) -> Json:
    """Return a recipe, or a dataclass that is part of one, as JSON values.

    A field whose default is None is left out if it is None: it does not apply to every cache, or it
    was added later, and the fingerprints of earlier caches stay valid.
    """
    value: Json = json.loads(canonical_json(_without_later(spec, asdict(spec))))
    return value


def _without_later(spec: Any, value: Json) -> Json:
    """Return a dataclass's fields by name, without those whose value and default are None.

    Dataclasses inside the dataclass, and inside its tuples, are treated alike.
    """
    kept = {
        f.name: value[f.name]
        for f in fields(spec)
        if f.default is not None or value[f.name] is not None
    }

    def plain(part: Any, json_value: Any) -> Any:
        if is_dataclass(part):
            return _without_later(part, json_value)
        if isinstance(part, tuple):
            return [plain(*pair) for pair in zip(part, json_value, strict=True)]
        return json_value

    return {name: plain(getattr(spec, name), kept[name]) for name in kept}


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedSample:
    """A sample that has a row but no features, because its image failed."""

    row: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a source."""

    index: int
    """Index in the source's own order."""
    key: str
    """Unique name; docs/images.md describes how each kind of source forms it."""
    label: int | None = field(default=None)
    """Class index; None if the source has no classes."""
