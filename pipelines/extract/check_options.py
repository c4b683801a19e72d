"""Options of an extraction that contradict each other, the teacher or the size of its features."""

from dtcache.errors import ConfigError
from dtcache.options import ExtractOptions
from dtcache.options.parse import timm_name
from dtcache.recipe import MAX_SHARD_ROWS, MAX_VIEWS
from dtcache.teacher import CallableTeacher


def check_options(options: ExtractOptions, teacher: CallableTeacher | None) -> None:
    """Raise ConfigError if options contradict each other or the kind of teacher."""
    if (teacher is None) != bool(options.teacher):
        got = "both" if options.teacher else "neither"
        raise ConfigError(
            "`teacher`: expected the name of a teacher or, from Python, a CallableTeacher, got "
            f"{got}"
        )
    if timm_name(options.teacher) is not None and options.timestep is not None:
        given = ", ".join(map(str, options.timestep))
        raise ConfigError(
            f"`timestep` {given}: a timm teacher takes no noise; leave `timestep` out"
        )
    if teacher is not None and options.prompt is not None:
        raise ConfigError("`prompt`: a CallableTeacher reads no text; leave `prompt` out")
    _check_workers(options, teacher)
    _check_encoding(options, teacher)
    _check_views(options)
    if options.shard_rows is not None and options.shard_rows > MAX_SHARD_ROWS:
        raise ConfigError(f"`shard_rows` {options.shard_rows}: expected at most {MAX_SHARD_ROWS}")


def _check_workers(options: ExtractOptions, teacher: CallableTeacher | None) -> None:
    """Raise ConfigError if the options name two clusters, or workers that cannot be started."""
    if (options.workers or options.scheduler) and teacher is not None:
        raise ConfigError(
            "`workers`, `scheduler`: a CallableTeacher exists in this process only; leave them out"
        )
    if options.workers and options.scheduler:
        raise ConfigError(
            f"`workers` {options.workers} starts a cluster, `scheduler` {options.scheduler} uses "
            "one: pass one of them"
        )
    if options.workers and ":" in options.device:
        raise ConfigError(
            f"`device` {options.device} names one GPU, and `workers` take one each: pass "
            "`device='cuda'`, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if options.dashboard and not options.workers:
        raise ConfigError(
            "`dashboard`: expected `workers` with it; a scheduler of your own has its own dashboard"
        )


def _check_encoding(options: ExtractOptions, teacher: CallableTeacher | None) -> None:
    """Raise ConfigError for draws if there is no noise, and for DDIM steps without an inversion."""
    is_timm = timm_name(options.teacher) is not None
    if is_timm and options.encoding == "ddim":
        raise ConfigError(
            "`encoding='ddim'`: a timm teacher takes no noise, so there is none to invert an image "
            "to; leave `encoding` out"
        )
    if options.encoding != "ddim" and options.ddim_steps is not None:
        raise ConfigError(
            f"`ddim_steps` {options.ddim_steps}: expected `encoding='ddim'` with it; pass both or "
            "neither"
        )
    cause = None
    if options.encoding == "ddim":
        cause = "`encoding='ddim'`"
    elif is_timm:
        cause = "a timm teacher"
    elif teacher is not None and not teacher.is_random:
        cause = "a CallableTeacher without prepare"
    if (options.draws > 1 or options.average) and cause is not None:
        raise ConfigError(
            f"{cause} draws no noise: expected `draws=1` and no `average`, got "
            f"`draws={options.draws}`"
        )


def _check_views(options: ExtractOptions) -> None:
    """Raise ConfigError if `draws`, `average`, `flip` and `batch_size` contradict each other."""
    if options.average and options.draws < 2:
        raise ConfigError(
            f"`average`: expected at least 2 `draws` to take the mean of, got {options.draws}"
        )
    if options.flip and options.batch_size is not None and options.batch_size < 2:
        raise ConfigError(
            f"`batch_size` {options.batch_size}: expected at least 2, both flips of an image"
        )
    views = options.draws * (2 if options.flip else 1)
    if max(options.draws, 1 if options.average else views) > MAX_VIEWS:
        raise ConfigError(
            f"`draws` {options.draws}: expected at most {MAX_VIEWS} draws, and at most "
            f"{MAX_VIEWS} views per image"
        )


def check_target(options: ExtractOptions, fp16_bytes: int) -> None:
    """Raise ConfigError if `bytes_per_image` is too large, or `quality` is passed too.

    `fp16_bytes` are the bytes per image of float16 features.
    """
    target = options.bytes_per_image
    if target is not None and (options.quality != "default" or target >= fp16_bytes):
        raise ConfigError(
            f"`bytes_per_image` {target:g}: expected fewer than the {fp16_bytes} bytes of float16, "
            "and no `quality` with it; leave it out, or store float16 with `quality='fp16'`"
        )
