"""The `dtcache` command: each verb parses its options, calls one pipeline and prints what came of it."""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dtcache._version import __version__
from dtcache.errors import DtcacheError
from dtcache.options import ExtractOptions, TeachOptions

EXISTING = click.Path(exists=False, path_type=Path)


class Group(click.Group):
    """Translates dtcache's failures into one line and Ctrl-C into exit code 130, once, for every verb."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except DtcacheError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted; run the same command again to resume.", err=True)
            sys.exit(130)


def options_of(options: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag a field of a frozen dataclass, and pass it the filled dataclass as `options`."""
    hints = typing.get_type_hints(options)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def filled(**values: Any) -> Any:
            chosen = {f.name: values.pop(f.name) for f in dataclasses.fields(options)}
            return command(**values, options=options(**chosen))

        filled.__name__, filled.__doc__ = command.__name__, command.__doc__
        filled.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
        for f in reversed(dataclasses.fields(options)):
            filled = _flag(f, hints[f.name])(filled)
        return filled

    return decorate


def _flag(f: dataclasses.Field[Any], hint: Any) -> Callable[..., Any]:
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    name = f.name.replace("_", "-")
    shape: dict[str, Any] = {"help": f.metadata["help"], "default": f.default}
    shape["show_default"] = f.default not in (None, "")
    if f.metadata["metavar"]:
        shape["metavar"] = f.metadata["metavar"]
    if typing.get_origin(hint) is tuple:
        return click.option(f"--{name}", type=typing.get_args(hint)[0], multiple=True, **shape)
    if hint is bool:
        return click.option(f"--{name}/--no-{name}", **shape)
    if f.default == "":
        shape |= {"required": True, "default": None}
    kind = click.Choice(f.metadata["choices"]) if f.metadata["choices"] else EXISTING if hint is Path else hint
    return click.option(f"--{name}", type=kind, **shape)


def _out(help_text: str) -> Callable[..., Any]:
    return click.option("--out", type=click.Path(path_type=Path), required=True, help=help_text)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dtcache")
def main() -> None:
    """Cache a diffusion teacher's decoder features once; train any number of students from them.

    \b
    Example:
      dtcache extract photos/ --teacher google/ddpm-ema-church-256 --out church.cache
      dtcache inspect church.cache
      dtcache train church.cache --student resnet50 --out runs/resnet50
    """


@main.command()
@click.argument("images", type=EXISTING)
@_out("Directory of the teacher; a run found there is resumed.")
@options_of(TeachOptions)
def teach(images: Path, out: Path, options: TeachOptions) -> None:
    """Fit an unconditional DDPM on IMAGES (stage 0), where no teacher of the domain exists.

    \b
    Example:
      dtcache teach photos/ --size 64 --steps 20000 --out teachers/photos
    """
    from pipelines.teach import teach as run

    taught = run(images, out, options)
    click.echo(f"{taught.out}: {taught.steps} steps, loss {taught.final_loss:.4f}; see samples.png and loss.png")


@main.command()
@click.argument("images", type=EXISTING)
@_out("Folder of the cache; one found there is resumed if it was begun with the same recipe.")
@options_of(ExtractOptions)
def extract(images: Path, out: Path, options: ExtractOptions) -> None:
    """Cache the teacher's decoder features of IMAGES (stage 1).

    \b
    Example:
      dtcache extract photos/ --teacher google/ddpm-ema-church-256 --timestep 50 --out church.cache
    """
    from pipelines.extract import extract as run

    done = run(images, out, options)
    click.echo(f"{done.root}: {done.num_done} images cached in {done.seconds:.0f} s")
    for failed in done.failures[:10]:
        click.echo(f"  failed: {failed.key}: {failed.reason}", err=True)
    if done.failures:
        click.echo(f"{len(done.failures)} images failed; samples.parquet has every reason", err=True)


if __name__ == "__main__":
    main()
