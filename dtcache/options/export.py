"""Options of `dtcache export`."""

from dataclasses import dataclass

from dtcache.options.field import Options, option


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions(Options):
    """Options of `dtcache export`."""

    to: str = option("timm", "The library that is to read it.", choices=("timm", "torchvision"))
