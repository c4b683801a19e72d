"""A cache's recipe: made of options and a job, compared with another one, and read back as options and a teacher."""

from dataclasses import replace
from pathlib import Path

from dtcache.errors import AGAIN, CacheDamagedError, CacheMismatchError, ConfigError, TeacherError
from dtcache.options import QUALITY_RATIOS, ExtractOptions
from dtcache.recipe import CodecSpec, Json, Recipe
from dtcache.store.layout import SAMPLES
from dtcache.store.manifest import CacheManifest, require_same
from dtcache.store.prompt_embedding import read_embedding
from dtcache.store.sample_index import changed_samples, hash_samples, read_table
from dtcache.teacher import Prompt, Teacher, load_teacher
from pipelines.extract.equivariance import Measured
from pipelines.extract.plan import Job, make_teacher


def fit_rows(count: int) -> int:
    """Return how many leading rows the codec is fitted on."""
    return min(256, count)


def target_ratio(job: Job, options: ExtractOptions) -> float | None:
    """Return how many times under fp16 the features shall lie, None to keep them float16. Raises ConfigError."""
    if options.bytes_per_image is None:
        return QUALITY_RATIOS[options.quality]
    fp16 = (
        2
        * job.views
        * sum(tap.values for tap in job.teacher.spec.taps)
        * len(job.teacher.spec.timesteps)
    )
    if options.quality != "default" or options.bytes_per_image >= fp16:
        raise ConfigError(
            f"--bytes-per-image {options.bytes_per_image:g}: expected fewer than the {fp16} bytes of float16, and no "
            f"--quality beside it; leave it out, or use --quality fp16 to store features as they are"
        )
    return fp16 / options.bytes_per_image


def asked(job: Job, options: ExtractOptions) -> Json:
    """Return the recipe's fields that options and inputs fix, to be compared with a cache that is there."""
    ratio = target_ratio(job, options)
    unfitted = CodecSpec(
        name="float16" if ratio is None else "pca-dct-rans",
        ratio=ratio,
        step=None,
        fit_rows=fit_rows(len(job.samples)),
        fit_sha256="",
        noise_share={},
        noise_floor={},
        determined_error={},
    )
    nothing = Measured(equivariance=None, round_trip=None)
    fixed = recipe_of(job, unfitted, options, nothing).to_json()
    # The rest of these is fitted, or follows from what is compared already.
    fixed["codec"] = {name: fixed["codec"][name] for name in ("name", "whitening", "ratio")}
    del fixed["teacher"]["alpha_bars"], fixed["teacher"]["snrs"]
    for name in ("ddim_steps", "compiled"):
        fixed["teacher"].setdefault(name, None)
    condition = fixed["teacher"].pop("condition", None)
    if condition is not None:
        causes = {
            name: condition[name] for name in ("kind", "number", "prompt") if name in condition
        }
        fixed["teacher"]["condition"] = causes | condition
    for name in ("shard_rows", "threads"):
        if getattr(options, name) is None:
            fixed.pop(name, None)
    # Another seed changes the sample list too, other taps or views the ratio of a size: name causes before effects.
    return {name: fixed[name] for name in ("seed", "flips", "draws", "average", "teacher")} | fixed


def require_same_job(root: Path, found: Json, wanted: Json, job: Job) -> None:
    """Raise CacheMismatchError naming the field of `wanted` that a cache's recipe has otherwise, or what of the images.

    The images come last, since an option, such as the seed, may be why their list is another one.
    """
    lists = ("num_samples", "samples_sha256")
    require_same(root, found, {name: value for name, value in wanted.items() if name not in lists})
    if any(found[name] != wanted[name] for name in lists):
        what = changed_samples(read_table(root / SAMPLES), job.samples)
        raise CacheMismatchError(
            f"{root} holds a cache of another recipe: of other images: {what}; give the images and the --limit that it "
            "was begun with, or another --out"
        )


def recipe_of(job: Job, codec: CodecSpec, options: ExtractOptions, measured: Measured) -> Recipe:
    """Return the recipe of a job, with its fitted codec and what was measured of its teacher."""
    return Recipe(
        teacher=job.teacher.spec,
        view=job.view,
        codec=codec,
        samples_sha256=hash_samples(job.samples),
        num_samples=len(job.samples),
        flips=len(job.flips) == 2,
        draws=job.draws,
        average=job.average,
        seed=job.seed,
        shard_rows=options.shard_rows or 0,
        threads=options.threads,
        images="view" if job.stores_images else "none",
        equivariance=measured.equivariance,
        round_trip=measured.round_trip,
    )


def cache_teacher(
    root: Path, manifest: CacheManifest, where: str, device: str | None = None
) -> Teacher:
    """Return the teacher of a cache with the recipe's constants, on the recipe's kind of device or another.

    A prompt's embedding is read from the cache. Raises TeacherError where `where` is another teacher, and what loading
    one raises.
    """
    options = options_of(manifest.recipe, where)
    recipe = manifest.recipe["teacher"]
    if device is not None:
        options = replace(options, device=device)
    loaded = load_teacher(where, prompt=options.prompt, stored=stored_prompt(root, manifest))
    alpha_bars = [
        float(loaded.alpha_bars[t]) for t in recipe["timesteps"] if t < len(loaded.alpha_bars)
    ]
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
        raise CacheDamagedError(
            f"{root}: the prompt's embedding is not the one that the recipe names; {AGAIN}"
        )
    return prompt


def options_of(recipe: Json, teacher: str) -> ExtractOptions:
    """Return the options that a recipe was asked for with, but the size, which only a fit reads."""
    view = recipe["view"]
    spec = recipe["teacher"]
    condition = spec.get("condition", {})
    kind = condition.get("kind")
    return ExtractOptions(
        teacher=teacher,
        prompt=condition.get("prompt"),
        condition=str(condition["number"])
        if kind == "class"
        else kind
        if kind in ("label", "null")
        else None,
        size=f"{view['height']}x{view['width']}",
        fit=view["fit"],
        taps=",".join(tap["name"] for tap in spec["taps"]),
        timestep=tuple(spec["timesteps"]),
        encoding="ddpm" if spec.get("ddim_steps") is None else "ddim",
        ddim_steps=spec.get("ddim_steps"),
        compile=bool(spec.get("compiled")),
        seed=recipe["seed"],
        flip=recipe["flips"],
        draws=recipe["draws"],
        average=recipe["average"],
        images=recipe["images"],
        batch_size=spec["batch_size"],
        limit=recipe["num_samples"],
        shard_rows=recipe["shard_rows"],
        threads=recipe.get("threads"),
        device=spec["device_type"],
        precision=spec["precision"],
    )
