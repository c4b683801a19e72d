"""Tar shards: every image is found at its offset, and damaged or unusual tars are refused."""

import io
import os
import tarfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtcache.errors import ImagesError, ImagesNotFoundError
from dtcache.images import TarSource, load_views, open_source
from dtcache.images.tar import MAX_HEADER_BYTES, group_of
from dtcache.recipe import ViewSpec
from pipelines.terminal.progress import track

RNG = np.random.default_rng(0)


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    """Write a tar of files."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def add(path: Path, info: tarfile.TarInfo) -> Path:
    """Write a tar with one good image and one special member."""
    with tarfile.open(path, "w") as tar:
        good = tarfile.TarInfo("good.jpg")
        good.size = 3
        tar.addfile(good, io.BytesIO(b"abc"))
        tar.addfile(info)
    return path


def test_images_are_found_where_they_lie(tmp_path: Path) -> None:
    """Keys are paths without extension in tar order, and bytes equal what tarfile extracts."""
    for shard in range(3):
        members = {
            f"dir/{shard}{i}.{'jpg' if i % 2 else 'PNG'}": RNG.bytes(100 + 700 * i)
            for i in range(5)
        }
        members |= {f"dir/{shard}{i}.json": b"{}" for i in range(5)}
        write_tar(tmp_path / f"{shard:03}.tar", members)
    source = open_source(tmp_path)
    assert list(source.keys) == [f"dir/{shard}{i}" for shard in range(3) for i in range(5)]
    assert (source.labels, source.classes) == (None, None)
    for index in RNG.permutation(15).tolist():
        key = source.keys[index]
        with tarfile.open(tmp_path / f"{key[4]:0>3}.tar") as tar:
            name = next(
                name
                for name in tar.getnames()
                if name.startswith(key) and not name.endswith("json")
            )
            extracted = tar.extractfile(name)
            assert extracted is not None
            assert source.read(index) == extracted.read()
    assert [(i, fetch()) for i, fetch in source.fetches([9, 0])] == [
        (i, source.read(i)) for i in (9, 0)
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read(tmp_path: Path, kind: int) -> None:
    """Long and non-ASCII names are read correctly from every tar format."""
    name = (
        f"{'d' * 90}/{'n' * 80}" if kind == tarfile.USTAR_FORMAT else f"{'d' * 200}/ü/{'n' * 150}"
    )
    source = open_source(
        write_tar(tmp_path / "a.tar", {f"./{name}.webp": b"x", "b.jpg": b"yz"}, format=kind)
    )
    assert list(source.keys) == [name, "b"]
    assert [source.read(i) for i in (0, 1)] == [b"x", b"yz"]


def test_cls_files_are_labels(tmp_path: Path) -> None:
    """A sample's .cls file labels each of its images; without one there is no label."""
    members = {
        "a.cls": b"7\n",
        "a.jpg": b"1",
        "b.left.png": b"2",
        "b.right.png": b"3",
        "c.jpg": b"4",
        "b.cls": b"0",
    }
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert list(source.keys) == ["a", "b.left", "b.right", "c"]
    assert list(source.labels or []) == [7, 0, 0, None]


def test_names_with_dots_have_their_own_labels(tmp_path: Path) -> None:
    """A .cls labels the images whose names continue its stem; the longest stem counts."""
    members = {
        f"{name}.{extension}": data
        for name, data in (("v1.0", b"0"), ("v1.5", b"1"), ("d.x/v1.9", b"2"), ("v2", b"3"))
        for extension in ("jpg", "cls")
    }
    members |= {"v1.7.jpg": b"", "v2.left.png": b"", "v2.right.png": b"", "v2.right.cls": b"4"}
    members |= {"w.jpg": b"", "w.label.cls": b"5", "gone.cls": b"6", "gone.json": b"{}"}
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert dict(zip(source.keys, source.labels or [], strict=True)) == {
        "v1.0": 0,
        "v1.5": 1,
        "d.x/v1.9": 2,
        "v2": 3,
        "v1.7": None,
        "v2.left": 3,
        "v2.right": 4,
        "w": 5,
    }
    assert source.survey.summary == (
        "8 images in 6 classes (0, 1, 2, 3, 4, 5), 1 to 2 each, 1 without a label; left out: "
        "1 file of another name (.json), 1 label without an image (gone.cls)"
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ["a.left.png", "a.0.cls"],
            r"ambiguous whether a\.left\.png has the label of a\.0\.cls: both share the sample a",
        ),
        (["a.jpg", "a.0.cls", "a.1.cls"], r"a\.jpg has the label of a\.0\.cls and a\.1\.cls"),
    ],
)
def test_ambiguous_labels_are_refused(tmp_path: Path, members: list[str], message: str) -> None:
    """An image and a label that share a sample, but not a stem, are refused with both names."""
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(members, b"1"))
    with pytest.raises(ImagesError, match=message):
        open_source(path)


@pytest.mark.parametrize("second", [b"0", b"1"])
def test_two_labels_of_one_name_must_agree(tmp_path: Path, second: bytes) -> None:
    """Two .cls files of one name are refused with both labels, unless they are equal."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("1.jpg", b"x"), ("1.cls", b"0"), ("./1.cls", second)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if second == b"0":
        assert list(open_source(path).labels or []) == [0]
        return
    with pytest.raises(
        ImagesError,
        match=r"two files 1\.cls, with the labels 0 at byte 1024 and 1 at byte 2048; leave one",
    ):
        open_source(path)


def test_hidden_members_are_left_out(tmp_path: Path) -> None:
    """Members that a Mac or a hidden folder adds are counted, whether they are images or not."""
    names = ("./1.jpg", "./._1.jpg", "__MACOSX/1.jpg", "a/.thumbs/2.png", ".DS_Store", "a/./3.png")
    source = open_source(write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"")))
    assert list(source.keys) == ["1", "a/./3"]
    assert source.survey.summary == (
        "2 images without labels; left out: 4 hidden names (._1.jpg, __MACOSX/1.jpg, "
        "a/.thumbs/2.png, ...)"
    )


def test_a_second_archive_in_a_tar_is_refused(tmp_path: Path) -> None:
    """Joined tars are refused with the second one's place; other bytes after the end are told."""
    first = write_tar(tmp_path / "1.tar", {"a.jpg": b"1"})
    second = write_tar(tmp_path / "2.tar", {"b.jpg": b"2"})
    size = first.stat().st_size
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + bytes(3 << 20) + second.read_bytes())
    with pytest.raises(
        ImagesError, match=rf"got several: another one starts at byte {size + (3 << 20)}; unpack"
    ):
        open_source(joined)
    joined.write_bytes(first.read_bytes() + b"signature")
    assert open_source(joined).survey.summary == (
        f"1 image without labels; left out: 1 tar with bytes after its end (joined.tar from byte "
        f"{size})"
    )


def test_a_sample_is_named_up_to_the_first_dot() -> None:
    """Members are grouped as in WebDataset; dots in folder names do not count."""
    assert [group_of(name) for name in ("a.jpg", "v1.5/a.b.png", "x/y")] == ["a", "v1.5/a", "x/y"]


def test_keys_that_tars_share_have_the_tars_name(tmp_path: Path) -> None:
    """Keys that several shards share get the shard's name, and then all images do."""
    write_tar(tmp_path / "train-0.tar", {"000.jpg": b"1", "001.jpg": b"2"})
    write_tar(tmp_path / "train-1.tar", {"000.jpg": b"3", "002.jpg": b"4"})
    source = open_source(tmp_path)
    assert list(source.keys) == ["train-0/000", "train-0/001", "train-1/000", "train-1/002"]
    assert source.read(2) == b"3"


def test_a_key_that_comes_twice_in_a_tar_is_refused(tmp_path: Path) -> None:
    """A repeated key in a tar is refused with the names of both members."""
    path = write_tar(tmp_path / "a.tar", {"x/1.jpg": b"1", "x/2.jpg": b"2", "x/1.png": b"3"})
    with pytest.raises(
        ImagesError,
        match=(
            r"same name 'x/1': x/1\.jpg at byte 512 of \S+a\.tar and x/1\.png at byte 2560 of "
            r"\S+a\.tar"
        ),
    ):
        open_source(path)


def test_keys_may_differ_in_case_only(tmp_path: Path) -> None:
    """Keys may differ only in case, whatever the file system does."""
    source = open_source(write_tar(tmp_path / "a.tar", {"A.jpg": b"1", "a.jpg": b"2"}))
    assert list(source.keys) == ["A", "a"]


def test_views_come_from_tars(tmp_path: Path, scene_folder: Path) -> None:
    """Decoded views equal those of the packed folder, in the requested order."""
    folder = open_source(scene_folder)
    view = ViewSpec(height=16, width=16)
    write_tar(tmp_path / "a.tar", {key: folder.read(i) for i, key in enumerate(folder.keys)})
    order = RNG.permutation(len(folder.keys)).tolist()
    tars = load_views(open_source(tmp_path), order, view, threads=2)
    for packed, plain in zip(tars, load_views(folder, order, view, threads=2), strict=True):
        assert packed.index == plain.index
        np.testing.assert_array_equal(packed.pixels_CHW, plain.pixels_CHW)


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    """Return a member that is not a plain file."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (special("a.jpg", tarfile.SYMTYPE, "good.jpg"), r"'a\.jpg' is a link; pack the tar again"),
        (special("a.jpg", tarfile.LNKTYPE, "good.jpg"), r"'a\.jpg' is a link"),
        (special("a.jpg", tarfile.FIFOTYPE), r"'a\.jpg' is no file"),
        (special("a.jpg", tarfile.GNUTYPE_SPARSE), r"'a\.jpg' is a sparse file"),
        (
            tarfile.TarInfo("/etc/a.jpg"),
            r"expected relative UTF-8 paths without control characters, got '/etc/a\.jpg'",
        ),
        (
            tarfile.TarInfo("x/../../a.jpg"),
            r"expected relative UTF-8 paths without control characters, got 'x/\.\./\.\./a\.jpg'",
        ),
        (
            tarfile.TarInfo("x\033[2J.jpg"),
            r"expected relative UTF-8 paths without control characters, got 'x\\x1b\[2J\.jpg'",
        ),
    ],
)
def test_images_that_are_no_plain_files_are_refused(
    tmp_path: Path, info: tarfile.TarInfo, reason: str
) -> None:
    """Links, sparse files, devices and paths out of the tar are refused with member and tar."""
    with pytest.raises(ImagesError, match=rf"a\.tar: {reason}"):
        open_source(add(tmp_path / "a.tar", info))


def test_other_members_may_be_anything(tmp_path: Path) -> None:
    """Folders, and links that are not images, are skipped."""
    path = add(tmp_path / "a.tar", special("latest", tarfile.SYMTYPE, "good.jpg"))
    with tarfile.open(path, "a") as tar:
        tar.addfile(special("folder.jpg.d", tarfile.DIRTYPE))
    assert list(open_source(path).keys) == ["good"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path: Path, kind: str) -> None:
    """Compressed tars are refused, because they allow no random access."""
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(
        ImagesError,
        match=r"a\.tar: compressed with \w+, which does not allow random access; decompress it",
    ):
        open_source(tmp_path / "a.tar")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """A tar that is cut anywhere before its end-of-archive marker is refused."""
    whole = write_tar(
        tmp_path / "a.tar", {"a.jpg": RNG.bytes(700), "b.jpg": RNG.bytes(100)}
    ).read_bytes()
    end = 512 + 1024 + 512 + 512
    for size in [
        0,
        100,
        512,
        700,
        1211,
        1212,
        1536,
        1700,
        2048,
        2100,
        2148,
        2559,
        end,
        end + 100,
        end + 511,
    ]:
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(ImagesError, match=r"a\.tar: (cut off|not a readable tar file)"):
            open_source(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])
    assert len(open_source(tmp_path / "a.tar").keys) == 2


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    """A damaged header is refused.

    tarfile takes a damaged header for the end of the archive and would skip all later images.
    """
    path = write_tar(tmp_path / "a.tar", {"a.jpg": RNG.bytes(700), "b.jpg": RNG.bytes(100)})
    whole = bytearray(path.read_bytes())
    whole[1536 + 20] ^= 1
    path.write_bytes(whole)
    with pytest.raises(
        ImagesError, match=r"a\.tar: damaged: no header at byte 1536; copy or pack it again"
    ):
        open_source(path)


def sized(size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a header with these bytes in its size field."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize(
    ("size", "kind", "reason"),
    [
        (
            b"77777777777\0",
            tarfile.REGTYPE,
            "cut off: 'a.jpg' ends at byte 8589935103, the file at",
        ),
        (b"\x80" + b"\0" * 3 + b"\x7f" * 8, tarfile.REGTYPE, "cut off: 'a.jpg' ends at byte"),
        (b"\xff" * 10 + b"\xfe\0", tarfile.REGTYPE, "damaged: 'a.jpg' at byte 0 has -512 bytes"),
        (
            b"77777777777\0",
            tarfile.XHDTYPE,
            f"not a readable tar file .a header of more than {MAX_HEADER_BYTES} bytes",
        ),
        (
            b"77777777777\0",
            tarfile.GNUTYPE_LONGNAME,
            "not a readable tar file .a header of more than",
        ),
        (
            b"\xff" * 10 + b"\xfe\0",
            tarfile.XHDTYPE,
            "not a readable tar file .a header of more than",
        ),
    ],
)
def test_hostile_sizes_are_refused(tmp_path: Path, size: bytes, kind: bytes, reason: str) -> None:
    """A size beyond the file allocates no memory and causes no endless loop."""
    (tmp_path / "a.tar").write_bytes(sized(size, kind) + bytes(4096))
    with pytest.raises(ImagesError, match=rf"a\.tar: {reason}"):
        open_source(tmp_path / "a.tar")


def test_endless_sparse_maps_are_refused(tmp_path: Path) -> None:
    """A sparse map with more entries than the file has stops at the limit of header bytes."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": "9",
        }
        info.size = 512
        tar.addfile(info, io.BytesIO(b"999999999\n".ljust(512, b"1")))
    with pytest.raises(ImagesError, match=r"a\.tar: not a readable tar file"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("text", [b"cat", b"-1", b"", b"1.5", b"99999999999", b"7" * 40])
def test_labels_that_are_no_index_are_refused(tmp_path: Path, text: bytes) -> None:
    """A label that is not an index is refused with the member and its content."""
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "a.cls": text})
    with pytest.raises(
        ImagesError, match=r"a\.tar: 'a\.cls': expected a class index such as 7, got b'"
    ):
        open_source(path)


def test_tars_without_images_are_refused(tmp_path: Path) -> None:
    """A tar without images is refused with the extensions of images."""
    with pytest.raises(
        ImagesNotFoundError, match=r"no images in \S+a\.tar: expected files ending in \.apng"
    ):
        open_source(write_tar(tmp_path / "a.tar", {"a.txt": b"1"}))


@pytest.mark.parametrize("beside", ["x.parquet", "x.jpg", "sub/x.png"])
def test_tars_beside_other_images_are_refused(tmp_path: Path, beside: str) -> None:
    """A folder with two kinds of images is refused, so that neither is silently ignored."""
    write_tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    image = pa.array([{"bytes": b"1", "path": "1"}])
    pq.write_table(pa.table({"image": image}), tmp_path / beside)
    with pytest.raises(ImagesError, match=rf"expected one kind of images, got a\.tar and {beside}"):
        open_source(tmp_path)


def test_a_tar_that_shrinks_or_goes_fails_its_images(tmp_path: Path) -> None:
    """If a tar shrinks or vanishes after indexing, a read is complete or raises OSError."""
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"12345", "b.jpg": b"67890"})
    source = open_source(path)
    os.truncate(path, 512 + 3)
    with pytest.raises(OSError, match=r"a\.tar ends 2 bytes before the image does"):
        source.read(0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(0)


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    """A broken link to a shard is refused by name; a folder with a tar's name is a folder."""
    write_tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    (tmp_path / "c.tar").mkdir()
    assert list(open_source(tmp_path).keys) == ["a"]
    (tmp_path / "b.tar").symlink_to("nowhere")
    with pytest.raises(ImagesError, match=r"b\.tar: cannot be read \(No such file or directory\)"):
        open_source(tmp_path)


def test_indexing_shows_its_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress of indexing is counted in MiB of tar, whatever the number of files."""
    seen: list[int] = []

    counter = SimpleNamespace(advance=lambda count=1: seen.append(count))
    titles: list[tuple[str, int]] = []
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"{shard}{i}.jpg": bytes(1 << 19) for i in range(6)})
    files = sorted(tmp_path.glob("*.tar"))
    TarSource(files, lambda title, total: titles.append((title, total)) or nullcontext(counter))
    assert titles == [("index tar shards, MiB", 6)]
    assert sum(seen) == 4  # the last member begins in the third MiB
    with track("none", 1):
        assert len(TarSource(files, track).keys) == 12
