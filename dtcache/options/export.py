"""Options of `dtcache export`."""

from dataclasses import dataclass

from dtcache.options.field import Options, option


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions(Options):
    """Options of `dtcache export`."""

    to: str = option("timm", "Library that will load the weights.", choices=("timm", "torchvision"))
