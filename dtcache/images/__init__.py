"""Where images come from, and the view of them that teacher and students share."""

from dtcache.images.linked import LinkedImages
from dtcache.images.source import FolderSource, ImageSource, ParquetSource, open_source, permuted
from dtcache.images.view import LoadedView, decode_view, load_views

__all__ = [
    "FolderSource",
    "ImageSource",
    "LinkedImages",
    "LoadedView",
    "ParquetSource",
    "decode_view",
    "load_views",
    "open_source",
    "permuted",
]
