"""The options of each command: frozen dataclasses, from which the flags are made."""

from dtcache.options.demo import DemoOptions
from dtcache.options.evaluate import EvaluateOptions
from dtcache.options.export import ExportOptions
from dtcache.options.extract import QUALITY_RATIOS, ExtractOptions
from dtcache.options.field import Options, option
from dtcache.options.images import ImagesOptions
from dtcache.options.inspect import InspectOptions
from dtcache.options.label import LabelFitOptions, LabelWriteOptions
from dtcache.options.parse import parse_ints, parse_scale, parse_size, parse_taps
from dtcache.options.sweep import SweepOptions
from dtcache.options.teacher import ADM_PRESETS, ConvertOptions, TeacherShowOptions, TeachOptions
from dtcache.options.train import TrainOptions
from dtcache.options.verify import VerifyOptions

__all__ = [
    "ADM_PRESETS",
    "QUALITY_RATIOS",
    "ConvertOptions",
    "DemoOptions",
    "EvaluateOptions",
    "ExportOptions",
    "ExtractOptions",
    "ImagesOptions",
    "InspectOptions",
    "LabelFitOptions",
    "LabelWriteOptions",
    "Options",
    "SweepOptions",
    "TeachOptions",
    "TeacherShowOptions",
    "TrainOptions",
    "VerifyOptions",
    "option",
    "parse_ints",
    "parse_scale",
    "parse_size",
    "parse_taps",
]
