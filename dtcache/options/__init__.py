"""The options of each command: frozen dataclasses that become flags, and that Python callers pass as they are."""

from dtcache.options.cache import QUALITY_RATIOS, ExtractOptions, InspectOptions, VerifyOptions
from dtcache.options.field import Options, option
from dtcache.options.label import LabelFitOptions, LabelWriteOptions
from dtcache.options.parse import parse_ints, parse_share, parse_size, parse_taps
from dtcache.options.student import DemoOptions, EvaluateOptions, ExportOptions, TrainOptions
from dtcache.options.teacher import ADM_PRESETS, ConvertOptions, TeachOptions

__all__ = [
    "ADM_PRESETS",
    "QUALITY_RATIOS",
    "ConvertOptions",
    "DemoOptions",
    "EvaluateOptions",
    "ExportOptions",
    "ExtractOptions",
    "InspectOptions",
    "LabelFitOptions",
    "LabelWriteOptions",
    "Options",
    "TeachOptions",
    "TrainOptions",
    "VerifyOptions",
    "option",
    "parse_ints",
    "parse_share",
    "parse_size",
    "parse_taps",
]
