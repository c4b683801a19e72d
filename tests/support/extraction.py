"""Options of a quick extraction on a CPU."""

from pathlib import Path
from typing import Any

from dtcache.options import ExtractOptions


def quick_extraction(teacher: Path, **changes: Any) -> ExtractOptions:
    """Return the options of a quick extraction by the 32 px teacher, with some of them changed."""
    options: dict[str, Any] = {
        "timestep": (150,),
        "taps": "4,8",
        "precision": "fp32",
        "device": "cpu",
        "batch_size": 8,
    }
    return ExtractOptions(teacher=str(teacher), **(options | changes))
