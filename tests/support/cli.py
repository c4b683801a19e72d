"""The command line, run in this process."""

from click.testing import CliRunner, Result

from cli import main


def run(*arguments: object) -> Result:
    """Run `dtcache` with these arguments, each as text."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def words(text: str) -> tuple[str, ...]:
    """Return the flags of a command line without quotes, split at spaces."""
    return tuple(text.split())
