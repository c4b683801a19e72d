"""What a cache's recipe says, as the options and the teacher that it was made with."""

from dataclasses import replace
from pathlib import Path

from dtcache.errors import AGAIN, CacheDamagedError, TeacherError
from dtcache.options import ExtractOptions
from dtcache.spec import Json
from dtcache.store.embedding import read_embedding
from dtcache.store.manifest import CacheManifest
from dtcache.teacher import Prompt, Teacher, load_teacher
from pipelines.job import make_teacher


def cache_teacher(root: Path, manifest: CacheManifest, where: str, device: str | None = None) -> Teacher:
    """Return the teacher of a cache with the recipe's constants, on the recipe's kind of device or another.

    A prompt's embedding is read from the cache. Raises TeacherError where `where` is another teacher, and what loading
    one raises.
    """
    options, recipe = options_of(manifest.recipe, where), manifest.recipe["teacher"]
    if device is not None:
        options = replace(options, device=device)
    loaded = load_teacher(where, prompt=options.prompt, stored=stored_prompt(root, manifest))
    alpha_bars = [float(loaded.alpha_bars[t]) for t in recipe["timesteps"] if t < len(loaded.alpha_bars)]
    for what, got, wanted in (
        ("weights", loaded.weights_sha256, recipe["weights_sha256"]),
        ("noise levels", alpha_bars, recipe["alpha_bars"]),
        ("configuration", loaded.config_sha256, recipe["config_sha256"]),
    ):
        if got != wanted:
            raise TeacherError(
                f"--teacher {where}: not the teacher of {root}: expected {what} {wanted}, got {got}; give the teacher "
                "that the cache was extracted with"
            )
    return make_teacher(loaded, options)


def stored_prompt(root: Path, manifest: CacheManifest) -> Prompt | None:
    """Return the prompt of a cache's teacher, with its embedding. Raises CacheDamagedError where it is not whole."""
    condition = manifest.recipe["teacher"].get("condition")
    if condition is None or condition["kind"] != "prompt":
        return None
    prompt = Prompt(text=condition["prompt"], embedding_LD=read_embedding(root))
    if prompt.sha256 != condition["embedding_sha256"]:
        raise CacheDamagedError(f"{root}: the prompt's embedding is not the one that the recipe names; {AGAIN}")
    return prompt


def options_of(recipe: Json, teacher: str) -> ExtractOptions:
    """Return the options that a recipe was asked for with, but the size, which only a fit reads."""
    view, spec = recipe["view"], recipe["teacher"]
    condition = spec.get("condition", {})
    kind = condition.get("kind")
    return ExtractOptions(
        teacher=teacher,
        prompt=condition.get("prompt"),
        condition=str(condition["number"]) if kind == "class" else kind if kind in ("label", "null") else None,
        size=f"{view['height']}x{view['width']}",
        fit=view["fit"],
        taps=",".join(tap["name"] for tap in spec["taps"]),
        timestep=tuple(spec["timesteps"]),
        encoding="ddpm" if spec.get("ddim_steps") is None else "ddim",
        ddim_steps=spec.get("ddim_steps"),
        seed=recipe["seed"],
        flip=recipe["flips"],
        draws=recipe["draws"],
        average=recipe["average"],
        images=recipe["images"],
        batch_size=spec["batch_size"],
        limit=recipe["num_samples"],
        shard_rows=recipe["shard_rows"],
        device=spec["device_type"],
        precision=spec["precision"],
    )
