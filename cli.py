"""The `dtcache` command: each verb parses its options, calls one pipeline and prints the result."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtcache._version import __version__
from dtcache.errors import CacheFormatError, CacheNotFoundError
from dtcache.options import (
    ConvertOptions,
    DemoOptions,
    EvaluateOptions,
    ExportOptions,
    ExtractOptions,
    InspectOptions,
    LabelFitOptions,
    LabelWriteOptions,
    SweepOptions,
    TeacherShowOptions,
    TeachOptions,
    TrainOptions,
    VerifyOptions,
)
from dtcache.options.field import MAX_SCENES, MAX_SEED
from pipelines.terminal.commands import WRITES_NOTHING, Group, in_command_words
from pipelines.terminal.field_names import in_flags
from pipelines.terminal.flags import (
    FOLDER,
    JSON_FLAG,
    NO_LOCK_FLAG,
    PATH,
    location_argument,
    options_of,
    out_flag,
    print_json,
    require_text,
)
from pipelines.terminal.output import report, report_lines, say

if TYPE_CHECKING:
    from dtcache.store.remote import Location

TRY = "Try it"
CACHE = "Stage 1: the cache"
STUDENT = "Stage 2: students"
HELP = "Help"


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="dtcache")
def main() -> None:
    """Cache a diffusion teacher's decoder features once; train any number of students from them.

    \b
    Example:
      dtcache extract cats/ --teacher google/ddpm-cat-256 --out cats.cache
      dtcache inspect cats.cache
      dtcache train cats.cache --student resnet50 --out runs/resnet50

    \b
    Exit codes:
        0  done
        1  broken or failed: images, a teacher, a cache, a run or the machine
        2  wrong usage: change the command, a path, or a file of options
      130  interrupted
    """


@main.command(section=TRY, resumes=True)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("dtcache-demo"),
    show_default=True,
    help="Folder for all outputs.",
)
@NO_LOCK_FLAG
@options_of(DemoOptions)
def demo(out: Path, options: DemoOptions) -> None:
    """Run all stages on generated scenes, offline.

    The demo writes a cache, trains two students from the cache, and prints one table.

    \b
    Example:
      dtcache demo --out demo
    """
    from pipelines.demo import demo as run
    from pipelines.demo import render_demo
    from pipelines.terminal.console import show

    show(render_demo(run(out, options)))


@main.command(section=TRY, resumes=True)
@click.option(
    "--count", type=click.IntRange(min=1, max=MAX_SCENES), required=True, help="Number of scenes."
)
@click.option(
    "--start",
    type=click.IntRange(min=0, max=MAX_SCENES),
    default=0,
    show_default=True,
    help="Index of the first scene.",
)
@click.option(
    "--size",
    type=click.IntRange(min=16, max=4096),
    default=64,
    show_default=True,
    help="Side in pixels.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=MAX_SEED),
    default=0,
    show_default=True,
    help="Seed of the scenes.",
)
@out_flag("Folder for images/<class>/, masks/<class>/ and boxes.json.")
def scenes(count: int, start: int, size: int, seed: int, out: Path) -> None:
    """Generate labelled scenes to try dtcache on.

    Each scene has a class, a mask and boxes.

    \b
    Example:
      dtcache scenes --count 2000 --out scenes/
    """
    from pipelines.terminal.progress import track
    from pipelines.write_scenes import write_scenes

    with track("scenes", count) as progress:
        write_scenes(
            out, seed=seed, size=size, count=count, start=start, on_progress=progress.advance
        )
    report(f"{out / 'images'}: {count} scenes")


@main.group(section="Stage 0: the teacher")
def teacher() -> None:
    """Train, show or convert a teacher.

    \b
    Example:
      dtcache teacher show google/ddpm-cat-256
      dtcache teacher train photos/ --size 64 --out teachers/photos
    """


@teacher.command("train", resumes=True)
@click.argument("images", type=PATH)
@out_flag("Folder of the teacher. A run in this folder is resumed.")
@NO_LOCK_FLAG
@options_of(TeachOptions)
def teacher_train(images: Path, out: Path, options: TeachOptions) -> None:
    """Train an unconditional DDPM on IMAGES (stage 0).

    Train a teacher only if no published diffusion model fits your images.

    \b
    Example:
      dtcache teacher train photos/ --size 64 --steps 20000 --out teachers/photos
    """
    from pipelines.teach import teach

    taught = teach(images, out, options)
    if taught.final_loss is None:
        report(f"{taught.out}: a teacher with the untrained weights of --seed {options.seed}")
    else:
        report(
            f"{taught.out}: {taught.steps} steps, loss {taught.final_loss:.4f}; "
            "see samples.png and loss.png"
        )


@teacher.command("show")
@click.argument("where", metavar="DIR_OR_ID", callback=require_text)
@JSON_FLAG
@options_of(TeacherShowOptions)
def teacher_show(where: str, as_json: bool, options: TeacherShowOptions) -> None:
    """Show a teacher's taps, costs and noise schedule.

    The costs of a tap are its share of the FLOPs of a full pass, and its bytes in a cache. With
    --probe, also show how well a linear probe classifies your images from every block of the
    decoder at several timesteps, to choose --timestep and --taps by evidence.

    \b
    Example:
      dtcache teacher show google/ddpm-cat-256
      dtcache teacher show teachers/photos --probe photos/ --plot probe.png
      dtcache teacher show google/ddpm-cat-256 --json | jq '.taps[] | {name, flops_share}'
    """
    from pipelines.describe_teacher import describe_teacher, render_teacher
    from pipelines.terminal.console import show

    probe = None
    if options.probe is not None:
        from pipelines.probe_teacher import probe_teacher

        probe = probe_teacher(where, options)
    description = describe_teacher(where, options.size)
    if as_json:
        print_json(description if probe is None else {**description, "probe": probe.to_json()})
        return
    show(render_teacher(description))
    if probe is not None:
        show(probe.to_table())


@teacher.command("convert")
@click.argument("checkpoint", type=PATH)
@out_flag("Folder of the teacher: a new or empty one, or one with this same conversion.")
@NO_LOCK_FLAG
@options_of(ConvertOptions)
def teacher_convert(checkpoint: Path, out: Path, options: ConvertOptions) -> None:
    """Convert an OpenAI ADM checkpoint to a teacher.

    CHECKPOINT is a U-Net of guided-diffusion. The teacher is written as a diffusers folder
    (safetensors).

    \b
    Example:
      dtcache teacher convert 256x256_diffusion_uncond.pt --out teachers/adm-256
    """
    from pipelines.convert_adm import convert_adm

    report(convert_adm(checkpoint, out, options).summary)


@main.command(section=CACHE, resumes=True)
@click.argument("source", metavar="IMAGES", type=PATH)
@out_flag("Folder of the cache. A cache in this folder is resumed if its recipe is the same.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run two batches, print an estimate of time, bytes and memory, and write nothing.",
)
@NO_LOCK_FLAG
@options_of(ExtractOptions)
@click.pass_context
def extract(
    ctx: click.Context, source: Path, out: Path, dry_run: bool, options: ExtractOptions
) -> None:
    """Cache a teacher's features of IMAGES (stage 1).

    \b
    Example:
      dtcache extract cats/ --teacher google/ddpm-cat-256 --out cats.cache
      dtcache extract cats/ --teacher google/ddpm-cat-256 --out cats.cache --dry-run
    """
    if dry_run:
        from pipelines.extract.dry_run import forecast, render_forecast
        from pipelines.terminal.console import show

        ctx.meta[WRITES_NOTHING] = True
        show(render_forecast(forecast(source, out, options)))
        return
    from pipelines.extract.extract import describe_empty
    from pipelines.extract.extract import extract as run

    done = run(source, out, options)
    plural = "" if done.num_done == 1 else "s"
    report(f"{done.root}: {done.num_done} image{plural} cached in {done.seconds:.0f} s")
    for failed in done.failures[:10]:
        say(f"  failed: {failed.key}: {failed.reason}")
    if done.failures:
        say(f"{len(done.failures)} images failed; samples.parquet has every reason")
    if done.empty:
        say(describe_empty(done.empty))


@main.command(section=CACHE)
@location_argument("paths", "CACHE_OR_RUN...", several=True)
@JSON_FLAG
@options_of(InspectOptions)
def inspect(paths: tuple["Location", ...], as_json: bool, options: InspectOptions) -> None:
    """Show the contents of a cache or a run.

    One cache: its contents, bytes and, with --stats, statistics of its features. One run of
    dtcache train: its options and results. Several caches or several runs: their differences.
    Nothing is written into a cache or a run.

    \b
    Example:
      dtcache inspect cats.cache --json | jq .ratio
      dtcache inspect cats.cache --stats --report cats.html
      dtcache inspect cats-t50.cache cats-t250.cache
      dtcache inspect runs/resnet50 --cache cats.cache --report resnet50.html
    """
    from pipelines.inspect.inspect import inspect as run
    from pipelines.terminal.console import show

    inspected = run(paths, options)
    if as_json:
        print_json(inspected.to_json())
    else:
        show(inspected.render())


@main.command(section=CACHE)
@location_argument("cache", "CACHE")
@JSON_FLAG
@NO_LOCK_FLAG
@options_of(VerifyOptions)
@click.pass_context
def verify(ctx: click.Context, cache: "Location", as_json: bool, options: VerifyOptions) -> None:
    """Check a cache against its hashes, or repair it.

    CACHE may be unfinished. Its label sets are checked too. The report names each damaged file, the
    affected samples, and the remedy.

    \b
    Exit codes:
        0  good
        3  damaged
        4  intact but unfinished
        5  not a cache, or a cache with parts this version cannot read
        1  any other failure
        2  wrong usage, or CACHE does not exist
      130  interrupted

    \b
    Example:
      dtcache verify cats.cache
      dtcache verify cats.cache --repair --images cats/ --teacher google/ddpm-cat-256
    """
    from pipelines.terminal.console import show
    from pipelines.verify.report import render_verified, verified_json
    from pipelines.verify.verify import EXIT_CODES, NOT_A_CACHE
    from pipelines.verify.verify import verify as run

    def in_words(text: str) -> str:
        return in_flags(text, ctx.command)

    try:
        verified = run(cache, options)
    except (CacheNotFoundError, CacheFormatError) as error:
        if not (isinstance(cache, Path) and cache.exists()):
            raise
        say(f"Error: {in_command_words(error, ctx.command)}")
        ctx.exit(NOT_A_CACHE)
    if as_json:
        print_json(verified_json(verified, in_words))
    else:
        show(render_verified(verified, cache, in_words))
    ctx.exit(EXIT_CODES[verified.verification.state])


@main.group(section=CACHE)
def label() -> None:
    """Label a whole cache from a few labelled images.

    First fit an interpreter of the features, then write its soft labels for all images.

    \b
    Example:
      dtcache label fit cats.cache --masks masks/ --out interpreters/cats
      dtcache label write cats.cache interpreters/cats --name parts
      dtcache train cats.cache --labels parts --out runs/mixed
    """


@label.command("fit")
@location_argument("cache", "CACHE")
@out_flag("New folder of the interpreter.")
@NO_LOCK_FLAG
@options_of(LabelFitOptions)
def label_fit(cache: "Location", out: Path, options: LabelFitOptions) -> None:
    """Train an interpreter of CACHE's features.

    The interpreter trains on the cached features of the labelled images; the teacher does not run.

    \b
    Example:
      dtcache label fit cats.cache --masks masks/ --out interpreters/cats
    """
    from pipelines.label.fit_interpreter import fit_interpreter

    fitted = fit_interpreter(cache, out, options)
    scores = ""
    for name, value in (fitted.validation or {}).items():
        scores += f", {name} {value:.1%}" if isinstance(value, float) else ""
    held_out = f"; {fitted.validation['images']} held out{scores}" if fitted.validation else ""
    report(f"{fitted.out}: fitted to {fitted.trained_on} labelled images{held_out}")


@label.command("write", resumes=True)
@click.argument("cache", type=PATH)
@click.argument("interpreter", type=PATH)
@NO_LOCK_FLAG
@options_of(LabelWriteOptions)
def label_write(cache: Path, interpreter: Path, options: LabelWriteOptions) -> None:
    """Write soft labels for every image of CACHE.

    INTERPRETER predicts the labels of each view. They are stored in CACHE/labels/NAME.

    \b
    Example:
      dtcache label write cats.cache interpreters/cats --name parts
    """
    from pipelines.label.write_labels import write_labels

    done = write_labels(cache, interpreter, options)
    report(
        f"{done.root}: soft labels of {done.images} images, {done.share:.1%} of the features' "
        f"bytes; mean total variation from the exact labels {done.measured['total_variation']:.4f}"
    )


@main.command(section=STUDENT, resumes=True)
@location_argument("where", "CACHE...|IMAGES", several=True)
@out_flag("Folder of the run or runs. A run there is resumed if its options are the same.")
@NO_LOCK_FLAG
@options_of(TrainOptions)
def train(where: "tuple[Location, ...]", out: Path, options: TrainOptions) -> None:
    """Train students (stage 2) on a cache or online.

    Pass CACHE to train from cached features, or IMAGES and --teacher to run the teacher in the
    loop. Several caches of the same images are several teachers; caches of one teacher and other
    images are its parts. The backbone is exported for timm. Several students, separated by commas,
    share one loader; the run of each is OUT/NAME. To train in several processes, use torchrun:
    torchrun --nproc-per-node 8 --no-python dtcache train ...

    \b
    Example:
      dtcache train cats.cache --student resnet50 --epochs 100 --out runs/resnet50
      dtcache train cats.cache --student resnet18,resnet50 --out runs
      dtcache train ddpm.cache dinov3.cache --student resnet50 --out runs/two-teachers
      dtcache train photos/ --teacher google/ddpm-cat-256 --timestep 150 --out runs/online
      dtcache train s3://bucket/cats.cache --student resnet50 --out runs/remote
      dtcache train cats.cache --config runs/a/config.toml --extend runs/a --epochs 50 --out runs/b
    """
    from pipelines.train.shared_loader import runs_of
    from pipelines.train.train import train_shared

    for done in train_shared(where, runs_of(out, options)):
        report(
            f"{done.out / 'backbone'}: {done.steps} steps, held-out loss {done.held_out_loss:.4f}, "
            f"{done.wait_share:.1%} of the time waiting for data"
        )


@main.command(section=STUDENT)
@click.argument("source", metavar="RUN_OR_BACKBONE", type=PATH)
@out_flag("New folder for the weights and their configuration.")
@options_of(ExportOptions)
def export(source: Path, out: Path, options: ExportOptions) -> None:
    """Export a backbone to timm or torchvision.

    The exported network's outputs are compared with those of the original.

    \b
    Example:
      dtcache export runs/resnet50 --to torchvision --out exported/resnet50
    """
    from pipelines.export import export as run

    done = run(source, out, options)
    report(
        f"{done.out}: {done.architecture} for {options.to}; on random images its outputs differ "
        f"from the original's by at most {done.difference:.3g} (largest output "
        f"{done.largest:.3g})"
    )
    report(f"  {done.usage}")


@main.command(section=STUDENT)
@click.argument("model", callback=require_text)
@JSON_FLAG
@options_of(EvaluateOptions)
def evaluate(model: str, as_json: bool, options: EvaluateOptions) -> None:
    """Evaluate features: k-NN, probe, masks or boxes.

    MODEL is a backbone folder of dtcache or timm, a timm name (with a tag: pretrained weights;
    without: random weights), a cache (each tap), or, for classification, the word pixels. With
    --out, an interrupted training is resumed.

    \b
    Example:
      dtcache evaluate runs/resnet50/backbone --train labelled/train --test labelled/test --json
      dtcache evaluate runs/a/backbone --task segmentation --train images/ --train-masks masks/
      dtcache evaluate runs/a/backbone --task detection --train images/ --train-boxes boxes.json
    """
    from pipelines.evaluate.evaluate import evaluate as run

    result = run(model, options)
    if as_json:
        print_json({"model": model, **result.to_json()})
    else:
        from pipelines.terminal.console import show

        show(result.to_table(model))


@main.command(section=STUDENT, resumes=True)
@click.argument("file", metavar="SWEEP.toml", type=PATH)
@out_flag("Folder of the sweep. A sweep in this folder is resumed.")
@NO_LOCK_FLAG
@options_of(SweepOptions)
@click.pass_context
def sweep(ctx: click.Context, file: Path, out: Path, options: SweepOptions) -> None:
    """Train, evaluate and compare many students.

    SWEEP.toml lists caches, arms, seeds and tasks. What is finished is not done again; arms, seeds
    and tasks may be added. results.parquet, report.md and report.html are written after every job.
    Exit code 1: a job failed.

    \b
    Example:
      dtcache sweep losses.toml --out sweeps/losses --dry-run
      dtcache sweep losses.toml --out sweeps/losses --jobs 2
    """
    from pipelines.sweep.estimate import estimate, render_estimate
    from pipelines.sweep.report import PAGE, render_tables
    from pipelines.sweep.sweep import planned
    from pipelines.sweep.sweep import sweep as run
    from pipelines.terminal.console import show

    if options.dry_run:
        ctx.meta[WRITES_NOTHING] = True
        show(render_estimate(estimate(planned(file, out))))
        return
    swept = run(file, out, options)
    show(render_tables(swept.plan, swept.rows))
    report(f"{swept.plan.out / PAGE}")
    for failure in swept.failures:
        say(f"failed: {failure}")
    ctx.exit(1 if swept.failures else 0)


@main.command(section=HELP)
@click.argument("folder", type=PATH, required=False)
@JSON_FLAG
def doctor(folder: Path | None, as_json: bool) -> None:
    """Examine this machine, for a bug report.

    Shows versions, devices, threads, CPU instruction sets, and how fast bf16 is. With FOLDER, also
    measures its disk and tests its locks, in a temporary folder that is removed. Paste the output
    into a bug report.

    \b
    Example:
      dtcache doctor
      dtcache doctor caches/ --json
    """
    from pipelines.doctor import diagnose
    from pipelines.terminal.console import show

    diagnosis = diagnose(folder)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        show(diagnosis.render())


@main.command(section=HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for a shell.

    The shell then completes commands, options and their choices.

    \b
    Example:
      dtcache completion bash > ~/.local/share/bash-completion/completions/dtcache
      dtcache completion zsh > "${fpath[1]}/_dtcache"
      dtcache completion fish > ~/.config/fish/completions/dtcache.fish
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"click has no completion for {shell}")
    report_lines(script(main, {}, "dtcache", "_DTCACHE_COMPLETE").source())


if __name__ == "__main__":
    main()
