"""Loading views: in order, with the reason of each failure."""

from pathlib import Path

import numpy as np
from PIL import Image

from dtcache.images import FolderSource, load_views
from dtcache.recipe import ViewSpec

SQUARE = ViewSpec(height=16, width=16)


def test_loading_keeps_order_and_records_failures(tmp_path: Path) -> None:
    """Views come in the requested order; a bad file and a deleted file give a failure reason."""
    for i in range(4):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"")
    source = FolderSource(tmp_path)
    (tmp_path / "2.png").unlink()
    loaded = list(load_views(source, [3, 1, 0, 2, 3], SQUARE, threads=2))
    assert [v.index for v in loaded] == [3, 1, 0, 2, 3]
    assert [None if v.pixels_CHW is None else int(v.pixels_CHW.max()) for v in loaded] == [
        3,
        None,
        0,
        None,
        3,
    ]
    assert loaded[1].failure == "empty file"
    assert loaded[3].failure == "unreadable: No such file or directory"
