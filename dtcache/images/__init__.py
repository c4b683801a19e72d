"""Image sources, decoding, and the view that teacher and students share."""

from dtcache.images.decode import decode_view
from dtcache.images.folder import FolderSource
from dtcache.images.masks import MaskFolder, open_masks
from dtcache.images.parquet import ParquetSource
from dtcache.images.source import ImageSource, open_source
from dtcache.images.source_images import LinkedImages
from dtcache.images.survey import Survey
from dtcache.images.tar import TarSource
from dtcache.images.view_loader import LoadedView, load_views

__all__ = [
    "FolderSource",
    "ImageSource",
    "LinkedImages",
    "LoadedView",
    "MaskFolder",
    "ParquetSource",
    "Survey",
    "TarSource",
    "decode_view",
    "load_views",
    "open_masks",
    "open_source",
]
