"""Pages of caches and runs: one file, no requests, one colour basis, damaged samples left out."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store.builders import FAILED_ROW, FEATURES, FINE, begin, tiny_plan, tree
from support.files import flip
from support.hostile import replace_table, reseal
from support.inspecting import inspect, page_of

from dtcache.cache.cache import Cache
from pipelines.inspect.page.charts import Axis, Series, bar_chart, line_chart
from pipelines.inspect.page.pictures import colour_basis, segments

pytestmark = pytest.mark.usefixtures("apart")


def pixels(map_3: np.ndarray) -> np.ndarray:
    """Return a colour as integers."""
    return map_3.astype(int)


def test_colours_mean_the_same_in_every_image() -> None:
    """Equal features have equal colours in all images; the basis is NumPy's singular vectors."""
    rng = np.random.default_rng(0)
    maps = (rng.normal(size=(5, 4, 6, 6)) * np.array([4, 3, 2, 0.1])[:, None, None]).astype(
        np.float32
    )
    maps[3, :, 2, 2] = maps[0, :, 0, 0]
    basis = colour_basis(maps)
    assert (
        pixels(basis.colours(maps[3])[2, 2]).tolist()
        == pixels(basis.colours(maps[0])[0, 0]).tolist()
    )
    flat = np.moveaxis(maps, 1, 0).reshape(4, -1).T
    _, scales, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(basis.axes_C3.T @ axes[:3].T), np.eye(3), atol=1e-5)
    np.testing.assert_allclose(basis.std_3, scales[:3] / (len(flat) - 1) ** 0.5, rtol=1e-5)


def test_a_tap_of_one_channel_has_a_colour() -> None:
    """A map with fewer channels than colours works; a constant map does not divide by zero."""
    maps = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    assert colour_basis(maps).colours(maps[0]).shape == (2, 2, 3)
    constant = np.ones((2, 3, 2, 2), np.float32)
    assert (
        colour_basis(constant).colours(constant[0]) == colour_basis(constant).colours(constant[1])
    ).all()


def test_segments_are_common_to_all_images() -> None:
    """Equal features have one segment number in all images, the largest region 0; a constant map
    has one segment.
    """
    maps = np.zeros((3, 2, 8, 8), np.float32)
    maps[:, 0, 2:5, 2:5] = 9
    found = segments(maps)
    assert (found == found[0]).all()
    assert found[0, 0, 0] == 0 and len(np.unique(found)) == 2
    assert (found[0] == found[0, 2, 2]).sum() == 9
    assert (segments(np.ones((2, 2, 3, 3), np.float32)) == 0).all()


def test_charts_draw_what_they_are_given() -> None:
    """Points follow the axes, missing values break a line, and an empty chart is no error.

    None is a missing value, and so is zero on a logarithmic axis.
    """
    svg = line_chart(
        [Series(name="<a>", x=[1, 2, 3, 4], y=[1.0, None, 10.0, 100.0])],
        title="<t>",
        x="",
        y="",
        log_y=True,
    )
    assert "&lt;t&gt;" in svg and "<t>" not in svg
    assert svg.count("<polyline") == 1 and svg.count("<circle") == 1
    xs, ys = zip(
        *[map(float, p.split(",")) for p in re.search(r'points="([^"]+)"', svg)[1].split()],
        strict=True,
    )
    assert xs[0] < xs[1] and ys[0] > ys[1]
    assert "nothing to draw" in line_chart(
        [Series(name="a", x=[1], y=[0.0])], title="t", x="", y="", log_y=True
    )
    assert (
        bar_chart(["a", "b"], [(0.0, None, None), (2.0, 1.0, 3.0)], title="t", y="").count(
            "whisker"
        )
        == 1
    )


@pytest.mark.parametrize(
    ("low", "high", "log", "labels"),
    [
        (0, 1, False, ["0", "0.5", "1"]),
        (0.3, 3, True, ["0.5", "1", "2"]),
        (1e-4, 1, True, ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰"]),
        (0.01, 1, True, ["0.01", "0.1", "1"]),
        (2.3, 3.1, True, ["2.4", "2.6", "2.8", "3"]),
        (1.3, 9.9, True, ["2", "5"]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, labels: list[str]) -> None:
    """An axis has at least two ticks, at round values."""
    assert [
        label for _, label in Axis(low=low, high=high, start=0, end=1, log=log).ticks()
    ] == labels


def test_a_page_is_one_file_that_asks_for_nothing(tiny_cache: Path, tmp_path: Path) -> None:
    """A page is one file of at most 10 MB without any external reference."""
    before = tree(tiny_cache)
    page = page_of(tiny_cache, tmp_path / "out.html", "--gallery", 3)
    assert tree(tiny_cache) == before
    assert not re.search(r"https?://|<script|<link[^>]+stylesheet|@import|url\(", page)
    sources = re.findall(r'src="([^"]{5})', page)
    assert set(sources) == {"data:"}
    # Three images, in two galleries, each with one picture per tap.
    assert len(sources) == 3 * 2 * (1 + 2)
    assert len(page) < 10_000_000
    for heading in (
        "Bytes by part",
        "Gallery",
        "Segments",
        "Similarity and values",
        "Spectra",
        "Largest codec errors",
        "Failures",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert "cannot identify image file" in page
    assert FINE in page


def test_a_page_of_a_damaged_cache(tiny_copy: Path, tmp_path: Path) -> None:
    """A flipped bit removes one picture, and the page names the sample that was left out."""
    flip(tiny_copy / f"data.zarr/{FEATURES}/c.1.0.0")
    key = tiny_plan().samples[4].key
    page = page_of(tiny_copy, tmp_path / "out.html")
    assert f"{FINE} of {key}" in page
    assert f'alt="{FINE} of {key}"' not in page


def test_a_page_of_a_cache_without_a_readable_image(tiny_copy: Path, tmp_path: Path) -> None:
    """If all shards of a timestep are damaged, the page has no statistics of its taps."""
    for path in (tiny_copy / "data.zarr" / FEATURES).glob("c.*"):
        path.write_bytes(bytes(path.stat().st_size))
    page = page_of(tiny_copy, tmp_path / "out.html")
    assert page.count("None of the chosen images can be read") == 2
    assert "Left out of the statistics because they cannot be read: 18 files or samples" in page
    assert "by frequency" not in page


def test_a_page_of_an_unfinished_cache(tmp_path: Path) -> None:
    """The page of an unfinished cache shows the committed rows and says that they are not all."""
    plan = tiny_plan()
    writer = begin(tmp_path / "cache", plan)
    writer.write_shard(plan.shards[1])
    page = page_of(tmp_path / "cache", tmp_path / "out.html")
    assert '<span class="badge bad">unfinished</span>' in page
    assert f'<td class="wrap">{plan.samples[FAILED_ROW].key}</td>' in page
    assert "Images without features: 1." in page


def test_options_that_do_not_go_together(tiny_cache: Path, tmp_path: Path) -> None:
    """Each contradiction of options is refused in one line that says what was expected."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"student": "resnet10t", "cache": "abc"}')
    for arguments, message in (
        (
            (tiny_cache, "--cache", tiny_cache),
            "--cache: expected the folder of a run with it, got a cache",
        ),
        (
            (tiny_cache, tiny_cache, "--report", tmp_path / "x.html"),
            "--report: expected one cache, or runs; write one page per cache",
        ),
        (
            (tiny_cache, tmp_path / "run"),
            f"{tiny_cache}: expected a run, as {tmp_path / 'run'} is one; "
            "pass caches alone or runs alone",
        ),
        (
            (tmp_path / "run", "--stats"),
            f"--stats: expected a cache, got the run {tmp_path / 'run'}",
        ),
        (
            (tmp_path / "run", "--teacher", "x"),
            f"--teacher: expected a cache, got the run {tmp_path / 'run'}",
        ),
        (
            (tiny_cache, "--report", tmp_path / "no" / "x.html"),
            f"{tmp_path / 'no'} is not a folder; create the folder first",
        ),
        (
            (tmp_path / "run", "--report", tmp_path),
            f"--report {tmp_path}: expected the name of a file, got a folder",
        ),
        ((tiny_cache, "--num-samples", "0"), "--num-samples 0: expected at least 1"),
        (
            (tiny_cache, "--num-samples", "9"),
            "--num-samples: expected --stats or --report or --teacher with it",
        ),
        (
            (tiny_cache, "--num-samples", "9", "--exact"),
            "--num-samples and --exact: expected one of them",
        ),
        (
            (tiny_cache, "--gallery", "3", "--stats"),
            "--gallery: expected --report with it; alone it has no effect",
        ),
        (
            (tiny_cache, "--images", tiny_cache, "--stats"),
            "--images: expected --report or --teacher with it",
        ),
        ((tiny_cache, "--device", "cpu", "--stats"), "--device: expected --teacher with it"),
        (
            (tmp_path / "run", "--num-samples", "9"),
            f"--num-samples: expected a cache, got the run {tmp_path / 'run'}",
        ),
        (
            (tmp_path / "run", "--cache", tiny_cache),
            "--cache: expected --report with it; alone it has no effect",
        ),
        (
            (tmp_path / "run", "--device", "cpu", "--report", tmp_path / "x.html"),
            "--device: expected --cache with it; alone it has no effect",
        ),
    ):
        result = inspect(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert result.output.count("\n") == 1
    assert not (tmp_path / "x.html").exists()
    (tmp_path / "run" / "run.json").write_text('{"steps": 3}')
    assert (
        "not the options of dtcache train; pass the folder of a student's run"
        in inspect(tmp_path / "run").output
    )
    (tmp_path / "run" / "run.json").write_text("{")
    assert "not readable as JSON" in inspect(tmp_path / "run").output


def test_a_page_over_its_size_is_refused(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is written, and the message names the remedy."""
    monkeypatch.setattr("pipelines.inspect.page.render.MAX_BYTES", 1000)
    result = inspect(tiny_cache, "--report", tmp_path / "x.html")
    assert (
        "expected a page of at most 1000 bytes, got" in result.output
        and "pass a smaller --gallery" in result.output
    )
    assert not (tmp_path / "x.html").exists()


def test_photos_are_the_images(tiny_cache: Path, tmp_path: Path) -> None:
    """The gallery shows each key's cached image, within WebP's error."""
    import base64
    import io

    from PIL import Image

    page = page_of(tiny_cache, tmp_path / "out.html")
    opened = Cache(tiny_cache)
    found = dict(re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]+)"', page))
    assert len(found) == 9
    for data, key in found.items():
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(
            float
        )
        row = opened.samples["key"].to_pylist().index(key)
        errors = [
            np.abs(image - opened.images([r])[0].transpose(1, 2, 0)).mean()
            for r in (row, (row + 1) % 5)
        ]
        assert errors[0] < errors[1]


def test_a_missing_folder_of_the_page_is_said_first(tiny_cache: Path, tmp_path: Path) -> None:
    """The message comes before statistics are computed or a teacher is loaded."""
    result = inspect(tiny_cache, "--teacher", "nowhere", "--report", tmp_path / "no" / "x.html")
    assert f"{tmp_path / 'no'} is not a folder; create the folder first" in result.output


@pytest.mark.slow
def test_a_million_classes_make_neither_page_nor_terminal_large(
    tiny_copy: Path, tmp_path: Path
) -> None:
    """A million names of classes, and labels of any 32 bits, are shown by their first few."""
    names = [f"class {number}" for number in range(1_000_000)]
    samples = pq.read_table(tiny_copy / "samples.parquet")
    labels = [999_999, 2**31 - 1, -(2**31), *range(len(samples) - 3)]
    column = samples.schema.get_field_index("label")
    table = samples.set_column(column, samples.schema.field(column), pa.array(labels, pa.int32()))
    replace_table(tiny_copy / "samples.parquet", table)
    reseal(tiny_copy, lambda manifest: manifest.update(classes=names))
    out = tmp_path / "page.html"
    result = inspect(tiny_copy, "--stats", "--report", out)
    assert result.exit_code == 0, result.output
    assert "-2147483648 1, class 0 1" in " ".join(result.output.split())
    assert len(result.output) < 20_000 and out.stat().st_size < 1 << 20
    assert "class 500000" not in out.read_text()


def test_a_name_that_is_not_utf8_is_shown_with_escapes(tiny_copy: Path, tmp_path: Path) -> None:
    """A cache whose folder's name is not UTF-8, as names are under LANG=C, has a page."""
    root = tiny_copy.rename(tiny_copy.with_name("caf\udce9"))
    assert r"<title>caf\udce9" in page_of(root, tmp_path / "page.html")
