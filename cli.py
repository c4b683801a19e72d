"""The `dtcache` command: each verb parses its options, calls one pipeline and prints what came of it."""

from pathlib import Path

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
    TeachOptions,
    TrainOptions,
    VerifyOptions,
)
from pipelines.terminal.flags import (
    JSON_FLAG,
    PATH,
    WRITES_NOTHING,
    Group,
    in_flags,
    options_of,
    out_flag,
    print_json,
)
from pipelines.terminal.text import printable


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
    """


@main.command()
@click.option("--count", type=click.IntRange(min=1), required=True, help="Number of scenes.")
@click.option(
    "--start",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the first scene.",
)
@click.option(
    "--size", type=click.IntRange(min=16), default=64, show_default=True, help="Side in pixels."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the stream of scenes."
)
@out_flag("Folder for images/<class>/, masks/<class>/ and boxes.json.")
def scenes(count: int, start: int, size: int, seed: int, out: Path) -> None:
    """Generate small labelled scenes, with masks and boxes, for demonstrations and tests.

    \b
    Example:
      dtcache scenes --count 2000 --out scenes/
    """
    from dtcache.images.scenes import write_scenes
    from pipelines.terminal.progress import track

    with track("scenes", count) as progress:
        write_scenes(
            out, seed=seed, size=size, count=count, start=start, on_progress=progress.advance
        )
    click.echo(f"{out / 'images'}: {count} scenes")


@main.command()
@click.argument("images", type=PATH)
@out_flag("Directory of the teacher; a run found there is resumed.")
@options_of(TeachOptions)
def teach(images: Path, out: Path, options: TeachOptions) -> None:
    """Fit an unconditional DDPM on IMAGES (stage 0), where no teacher of the domain exists.

    \b
    Example:
      dtcache teach photos/ --size 64 --steps 20000 --out teachers/photos
    """
    from pipelines.teach import teach as run

    taught = run(images, out, options)
    click.echo(
        f"{taught.out}: {taught.steps} steps, loss {taught.final_loss:.4f}; see samples.png and loss.png"
    )


@main.command("convert-adm")
@click.argument("checkpoint", type=PATH)
@out_flag("Folder of the teacher; missing, empty, or this very conversion.")
@options_of(ConvertOptions)
def convert_adm(checkpoint: Path, out: Path, options: ConvertOptions) -> None:
    """Turn CHECKPOINT, one of OpenAI's guided-diffusion (ADM) U-Nets, into a teacher (diffusers, safetensors).

    \b
    Example:
      dtcache convert-adm 256x256_diffusion_uncond.pt --out teachers/adm-256
    """
    from pipelines.convert_adm import convert_adm as run

    click.echo(run(checkpoint, out, options).summary)


@main.command()
@click.argument("where", metavar="DIR_OR_ID")
@click.option(
    "--size", metavar="H[xW]", help="View size in pixels [default: the one that it was trained at]."
)
@JSON_FLAG
def teacher(where: str, size: str | None, as_json: bool) -> None:
    """Show what a teacher offers: its taps, what each costs to reach and to keep, its noise schedule.

    \b
    Example:
      dtcache teacher google/ddpm-cat-256 --json | jq '.taps[] | {name, flops_share}'
    """
    from rich.console import Console

    from pipelines.describe_teacher import describe_teacher, render_teacher

    report = describe_teacher(where, size)
    if as_json:
        print_json(report)
    else:
        Console().print(render_teacher(report))


@main.command()
@click.argument("source", metavar="IMAGES", type=PATH)
@out_flag("Folder of the cache; one found there is resumed if it was begun with the same recipe.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run two batches and print what the whole will take; write nothing.",
)
@options_of(ExtractOptions)
@click.pass_context
def extract(
    ctx: click.Context, source: Path, out: Path, dry_run: bool, options: ExtractOptions
) -> None:
    """Cache the teacher's decoder features of IMAGES (stage 1).

    \b
    Example:
      dtcache extract cats/ --teacher google/ddpm-cat-256 --timestep 50 --out cats.cache
    """
    if dry_run:
        from rich.console import Console

        from pipelines.extract.dry_run import forecast, render_forecast

        ctx.meta[WRITES_NOTHING] = True
        Console().print(render_forecast(forecast(source, out, options)))
        return
    from pipelines.extract.extract import extract as run

    done = run(source, out, options)
    click.echo(f"{done.root}: {done.num_done} images cached in {done.seconds:.0f} s")
    for failed in done.failures[:10]:
        click.echo(f"  failed: {failed.key}: {failed.reason}", err=True)
    if done.failures:
        click.echo(
            f"{len(done.failures)} images failed; samples.parquet has every reason", err=True
        )


@main.command()
@click.argument("paths", metavar="CACHE_OR_RUN...", type=PATH, nargs=-1, required=True)
@JSON_FLAG
@options_of(InspectOptions)
def inspect(paths: tuple[Path, ...], as_json: bool, options: InspectOptions) -> None:
    """Show what a cache or a run holds.

    One cache: its contents, bytes and, with --stats, statistics of its features. One run of
    dtcache train: its options and results. Several caches or several runs: what differs. Nothing
    is written into a cache or a run.

    \b
    Example:
      dtcache inspect cats.cache --json | jq .ratio
      dtcache inspect cats.cache --stats --report cats.html
      dtcache inspect cats-t50.cache cats-t250.cache
      dtcache inspect runs/resnet50 --cache cats.cache --report resnet50.html
    """
    from rich.console import Console

    from pipelines.inspect.inspect import inspect as run

    inspected = run(paths, options)
    if as_json:
        print_json(inspected.to_json())
    else:
        Console().print(inspected.render())


@main.command()
@click.argument("cache", type=PATH)
@JSON_FLAG
@options_of(VerifyOptions)
@click.pass_context
def verify(ctx: click.Context, cache: Path, as_json: bool, options: VerifyOptions) -> None:
    """Check a cache against its hashes, or repair it.

    CACHE may be unfinished. Its label sets are checked too. The report names each damaged file, the
    samples that it takes away, and the remedy.

    \b
    Exit codes:
      0  good
      3  damaged
      4  intact but unfinished
      5  not a cache, or a cache with parts this version cannot read
      2  wrong usage; 130  interrupted; 1  any other failure

    \b
    Example:
      dtcache verify cats.cache
      dtcache verify cats.cache --repair --images cats/ --teacher google/ddpm-cat-256
    """
    from rich.console import Console

    from pipelines.verify.report import render_verified, verified_json
    from pipelines.verify.verify import EXIT_CODES, NOT_A_CACHE
    from pipelines.verify.verify import verify as run

    def in_words(text: str) -> str:
        return in_flags(text, ctx.command)

    try:
        verified = run(cache, options)
    except (CacheNotFoundError, CacheFormatError) as error:
        click.echo(f"Error: {printable(in_words(str(error)))}", err=True)
        ctx.exit(NOT_A_CACHE)
    if as_json:
        print_json(verified_json(verified, in_words))
    else:
        Console().print(render_verified(verified, cache, in_words))
    ctx.exit(EXIT_CODES[verified.verification.state])


@main.group()
def label() -> None:
    """Spread a few labels over a whole cache: fit an interpreter of its features, write soft labels with it.

    \b
    Example:
      dtcache label fit cats.cache --masks masks/ --out interpreters/cats
      dtcache label write cats.cache interpreters/cats --name parts
      dtcache train cats.cache --labels parts --out runs/mixed
    """


@label.command("fit")
@click.argument("cache", type=PATH)
@out_flag("New folder of the interpreter.")
@options_of(LabelFitOptions)
def label_fit(cache: Path, out: Path, options: LabelFitOptions) -> None:
    """Train an interpreter on the features of those images of CACHE that are labelled; it needs no teacher.

    \b
    Example:
      dtcache label fit cats.cache --masks masks/ --out interpreters/cats
    """
    from pipelines.label.fit_interpreter import fit_interpreter

    fitted = fit_interpreter(cache, out, options)
    scores = ""
    for name, value in (fitted.validation or {}).items():
        scores += f", {name} {value:.1%}" if isinstance(value, float) else ""
    held = f"; {fitted.validation['images']} held out{scores}" if fitted.validation else ""
    click.echo(f"{fitted.out}: fitted to {fitted.trained_on} labelled images{held}")


@label.command("write")
@click.argument("cache", type=PATH)
@click.argument("interpreter", type=PATH)
@options_of(LabelWriteOptions)
def label_write(cache: Path, interpreter: Path, options: LabelWriteOptions) -> None:
    """Write the soft labels of every image and view of CACHE by INTERPRETER into CACHE/labels/NAME; resumes.

    \b
    Example:
      dtcache label write cats.cache interpreters/cats --name parts
    """
    from pipelines.label.write_labels import write_labels

    done = write_labels(cache, interpreter, options)
    click.echo(
        f"{done.root}: soft labels of {done.images} images, {done.share:.1%} of the features' bytes; mean total "
        f"variation from the exact ones {done.measured['total_variation']:.4f}"
    )


@main.command()
@click.argument("where", metavar="CACHE|IMAGES", type=PATH)
@out_flag("Folder of the run; one found there is resumed if it was begun with the same options.")
@options_of(TrainOptions)
def train(where: Path, out: Path, options: TrainOptions) -> None:
    """Train a student on CACHE (stage 2) and export its backbone for timm; or on IMAGES, the teacher in the loop.

    Several processes train one student: torchrun --nproc-per-node 8 --no-python dtcache train ...

    \b
    Example:
      dtcache train cats.cache --student resnet50 --epochs 100 --out runs/resnet50
      dtcache train photos/ --online --teacher DIR --timestep 50 --out runs/online
    """
    from pipelines.train.train import train as run

    done = run(where, out, options)
    click.echo(
        f"{done.out / 'backbone'}: {done.steps} steps, held-out loss {done.held_out_loss:.4f}, "
        f"{done.wait_share:.1%} of the time waiting for data"
    )


@main.command()
@click.argument("source", metavar="RUN_OR_BACKBONE", type=PATH)
@out_flag("New folder for the weights and their configuration.")
@options_of(ExportOptions)
def export(source: Path, out: Path, options: ExportOptions) -> None:
    """Export the backbone of a run to a folder that timm or torchvision reads, checked against the original.

    \b
    Example:
      dtcache export runs/resnet50 --to torchvision --out exported/resnet50
    """
    from pipelines.export import export as run

    done = run(source, out, options)
    click.echo(
        f"{done.out}: {done.architecture} for {options.to}; on random images its outputs differ from the original's by "
        f"at most {done.difference:.3g} (the largest is {done.largest:.3g})\n  {done.usage}"
    )


@main.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of a table.")
@options_of(EvaluateOptions)
def evaluate(model: str, as_json: bool, options: EvaluateOptions) -> None:
    """Judge the features of MODEL by k-NN and a linear classifier on labelled images, or by segmentation.

    MODEL is a backbone folder, a timm name (random weights), a cache (every tap) or, to classify, the word pixels.

    \b
    Example:
      dtcache evaluate runs/resnet50/backbone --train labelled/train --test labelled/test --json
      dtcache evaluate runs/resnet50/backbone --task segmentation --train images/ --train-masks masks/
    """
    from pipelines.evaluate.evaluate import evaluate as run
    from pipelines.evaluate.evaluate import results_json, results_table

    results = run(model, options)
    if as_json:
        print_json(results_json(model, results))
    else:
        from rich.console import Console

        Console().print(results_table(model, results))


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("dtcache-demo"),
    show_default=True,
    help="Folder for everything.",
)
@options_of(DemoOptions)
def demo(out: Path, options: DemoOptions) -> None:
    """Run the whole way on generated scenes, offline: cache, two students, one table.

    \b
    Example:
      dtcache demo --out demo
    """
    from rich.console import Console

    from pipelines.demo import demo as run
    from pipelines.demo import render_demo

    Console().print(render_demo(run(out, options)))


if __name__ == "__main__":
    main()
