"""Make the teacher of an extraction, from options or from the recipe of a cache."""

from dataclasses import replace
from pathlib import Path

from dtcache.device import resolve_compute
from dtcache.errors import AGAIN, CacheDamagedError, ConfigError
from dtcache.options import ExtractOptions, parse_size, parse_taps
from dtcache.options.extract import DEFAULT_TIMESTEP
from dtcache.process_settings import configure_process
from dtcache.recipe import MAX_SIDE, Json, ViewSpec
from dtcache.store.manifest import CacheManifest
from dtcache.store.prompt_embedding import read_embedding
from dtcache.teacher import (
    LoadedTeacher,
    Prompt,
    Teacher,
    TeacherSettings,
    load_teacher,
    native_size,
    prepare_teacher,
)

DDIM_STEPS = 20
"""Default number of steps of the DDIM inversion."""


def make_teacher(loaded: LoadedTeacher, options: ExtractOptions, batch_size: int) -> Teacher:
    """Return a loaded teacher with the size, taps, timesteps and device of the options.

    Every pass of the teacher has `batch_size` views; `options.batch_size` is ignored. Configures
    this process for the device. Raises ConfigError.
    """
    height, width = view_size(loaded, options.size)
    if max(height, width) > MAX_SIDE:
        raise ConfigError(f"`size` {height}x{width}: expected at most {MAX_SIDE} pixels per side")
    default = (DEFAULT_TIMESTEP,) if loaded.has_timesteps else (0,)
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    settings = TeacherSettings(
        view=ViewSpec(
            height=height,
            width=width,
            resize_mode="stretch" if options.resize_mode == "stretch" else "crop",
        ),
        taps=parse_taps(options.taps) if options.taps else None,
        timesteps=default if options.timestep is None else options.timestep,
        batch_size=batch_size,
        condition=options.condition,
        ddim_steps=(options.ddim_steps or DDIM_STEPS) if options.encoding == "ddim" else None,
        compile=options.compile,
    )
    return prepare_teacher(loaded, settings, compute)


def view_size(loaded: LoadedTeacher, size: str | None) -> tuple[int, int]:
    """Return the (height, width) of views of `size`, in pixels; None: of the training images.

    Raises ConfigError if the text is no size, or if the teacher does not state its own.
    """
    return parse_size(size) if size else native_size(loaded)


def cache_teacher(
    root: Path, manifest: CacheManifest, name: str, device: str | None = None
) -> Teacher:
    """Return the teacher of a cache, with the constants of the cache's recipe.

    `name` is the directory or Hugging Face id of the teacher. `device` replaces the recipe's device
    type. The embedding of a prompt is read from the cache. Raises ConfigError if `name` is a
    different teacher, and what loading a teacher raises.
    """
    options = options_from_recipe(manifest.recipe, name)
    recipe = manifest.recipe["teacher"]
    if device is not None:
        options = replace(options, device=device)
    loaded = load_teacher(name, prompt=options.prompt, stored=stored_prompt(root, manifest))
    alpha_bars = [
        float(loaded.alpha_bars[t]) for t in recipe["timesteps"] if t < len(loaded.alpha_bars)
    ]
    for property_name, got, expected in (
        ("weights", loaded.weights_sha256, recipe["weights_sha256"]),
        ("noise levels", alpha_bars, recipe["alpha_bars"]),
        ("configuration", loaded.config_sha256, recipe["config_sha256"]),
    ):
        if got != expected:
            raise ConfigError(
                f"`teacher` {name}: not the teacher of {root}: expected {property_name} "
                f"{expected}, got {got}; pass the teacher that the cache was extracted with"
            )
    return make_teacher(loaded, options, recipe["batch_size"])


def stored_prompt(root: Path, manifest: CacheManifest) -> Prompt | None:
    """Return the prompt of a cache's teacher with its embedding, or None if it has no prompt.

    Raises CacheDamagedError if the stored embedding is missing or damaged.
    """
    condition = manifest.recipe["teacher"].get("condition")
    if condition is None or condition["kind"] != "prompt":
        return None
    prompt = Prompt(text=condition["prompt"], embedding_LD=read_embedding(root))
    if prompt.sha256 != condition["embedding_sha256"]:
        raise CacheDamagedError(
            f"{root}: the stored embedding of the prompt does not have the SHA-256 of the recipe; "
            f"{AGAIN}"
        )
    return prompt


def options_from_recipe(recipe: Json, teacher: str) -> ExtractOptions:
    """Return the options that reproduce the cache of a recipe, except its target size.

    `quality` and `bytes_per_image` keep their defaults: only the fit of the codec depends on them.
    """
    view = recipe["view"]
    spec = recipe["teacher"]
    condition = spec.get("condition", {})
    return ExtractOptions(
        teacher=teacher,
        prompt=condition.get("prompt"),
        condition=_condition_option(condition),
        size=f"{view['height']}x{view['width']}",
        resize_mode=view["resize_mode"],
        taps=",".join(tap["name"] for tap in spec["taps"]),
        timestep=tuple(spec["timesteps"]),
        encoding="ddpm" if spec.get("ddim_steps") is None else "ddim",
        ddim_steps=spec.get("ddim_steps"),
        compile=bool(spec.get("compiled")),
        seed=recipe["seed"],
        flip=recipe["flips"],
        draws=recipe["draws"],
        average=recipe["average"],
        store_images=recipe["store_images"],
        batch_size=spec["batch_size"],
        limit=recipe["num_samples"],
        shard_rows=recipe["shard_rows"],
        threads=recipe.get("threads"),
        device=spec["device_type"],
        precision=spec["precision"],
    )


def _condition_option(condition: Json) -> str | None:
    """Return the option `condition` that reproduces a recipe's condition."""
    match condition.get("kind"):
        case "class":
            return str(condition["number"])
        case "label" | "null" as kind:
            return str(kind)
    return None
