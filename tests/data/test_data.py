"""Pictures, labels, splits and batches: every promise of lambdanets/data/, with its number."""

import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import socket
import struct
import subprocess
import tempfile
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import runs, until
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from lambdanets import data, files
from lambdanets.data import listing as listing_of_a_folder
from lambdanets.data import order as order_of
from lambdanets.data import transforms
from lambdanets.data.batches import Batches
from lambdanets.data.decode import open_image
from lambdanets.data.images import Images
from lambdanets.data.transforms import View
from lambdanets.errors import BadData, BadImage, DiskFault

GREY = View(image_px=4, in_channels=1, mean=(0.0,), std=(1.0,), crop_frac=1.0)
COLOUR = View(image_px=8, in_channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def png_file(width: int, height: int, *, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: what Pillow's own writer will not write, or would need the memory for."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


JPEG = encoded(noise(), "JPEG")
PNG = encoded(noise(), "PNG")


# ---- one picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_content_decides_and_not_the_suffix(kind, tmp_path):
    path = tmp_path / "picture.tiff"
    path.write_bytes(encoded(noise(), kind))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    if kind in ("PNG", "BMP"):
        assert image.tobytes() == noise().tobytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (JPEG[: len(JPEG) // 2], "cut off"),
        (PNG[: len(PNG) // 2], "cut off"),
        (encoded(noise(), "GIF")[:300], "cut off"),
        (encoded(noise(), "BMP")[:300], "cut off"),
        (encoded(noise(), "WEBP")[:100], "cut off"),
        (JPEG[:20], "cut off"),
        (PNG[:20], "cut off"),
        (random.Random(0).randbytes(2000), "no JPEG, PNG, WebP, GIF or BMP"),
        (b"<!DOCTYPE html><html>404</html>", "<!DOCTYPE html"),
        (encoded(noise(), "TIFF"), "no JPEG, PNG, WebP, GIF or BMP"),
        (encoded(noise(), "PPM"), "no JPEG, PNG, WebP, GIF or BMP"),
        (encoded(noise(), "ICO"), "no JPEG, PNG, WebP, GIF or BMP"),
        (PNG[:60] + bytes(50) + PNG[110:], "broken"),
    ],
    ids=[
        "empty",
        "jpeg",
        "png",
        "gif",
        "bmp",
        "webp",
        "jpeg20",
        "png20",
        "random",
        "html",
        "tiff",
        "ppm",
        "ico",
        "zeros",
    ],
)
def test_a_bad_file_gives_its_name_and_a_plain_reason(content, reason, tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    for source, name in ((path, "train/cat.jpg"), (content, "train/cat.jpg")):
        with pytest.raises(BadImage) as caught:
            open_image(source, name=name)
        assert caught.value.name == "train/cat.jpg"
        assert reason in caught.value.reason
        assert str(caught.value) == f"train/cat.jpg: {caught.value.reason}"
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_what_is_no_file_is_a_bad_image(kind, tmp_path):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    for known in (True, False):
        with pytest.raises(BadImage, match="is a folder or a device") as caught:
            open_image(path, known=known)
        assert caught.value.name == str(path)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(files, "PAUSES_S", (0, 0, 0))


def failing(monkeypatch, code, times=10**9, only=""):
    """The system refuses to open files, so many times; gives the list of those that were asked for."""
    asked, real = [], os.open

    def refuses(path, *rest, **more):
        if only in str(path) and isinstance(path, (str, Path)) and str(path).endswith(".png"):
            asked.append(str(path))
            if len(asked) <= times:
                raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuses)
    return asked


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_fault_of_the_disk_is_tried_again_and_then_says_nothing_of_the_picture(
    code, tmp_path, monkeypatch, no_pauses
):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with monkeypatch.context() as patch:
        asked = failing(patch, code, times=3)
        assert open_image(path).tobytes() == noise().tobytes()
        assert len(asked) == 4
    asked = failing(monkeypatch, code)
    with pytest.raises(DiskFault) as caught:
        open_image(path, name="train/a.png")
    assert (caught.value.name, caught.value.reason) == ("train/a.png", f"cannot be read: {os.strerror(code)}")
    assert not isinstance(caught.value, BadImage)
    assert len(asked) == 4
    with pytest.raises(DiskFault, match=os.strerror(code)):
        open_image(path, known=False)
    assert len(asked) == 5


def test_a_fault_in_the_middle_of_a_file_is_the_disks_too(tmp_path, monkeypatch, no_pauses):
    (tmp_path / "a.png").write_bytes(PNG)
    read = []

    class Breaking(io.BufferedReader):
        def read(self, size=-1):
            read.append(size)
            if len(read) > 5:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(os, "fdopen", lambda opened, mode: Breaking(io.FileIO(opened)))
    with pytest.raises(DiskFault, match="Input/output error"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("cut", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_are_a_picture_or_a_bad_image_and_nothing_else(kind, cut):
    whole, dice = bytearray(encoded(noise(), kind)), random.Random(cut)
    for _ in range(40):
        broken = bytearray(whole)
        for _ in range(4):
            broken[int(dice.random() * cut * len(broken))] = dice.randrange(256)
        with contextlib.suppress(BadImage):
            assert open_image(bytes(broken), max_px=100_000).mode == "RGB"


@pytest.mark.parametrize("side_px", [7_100, 9_500, 20_000])  # above max_px; where Pillow warns; where Pillow raises
def test_a_huge_picture_is_refused_by_its_header(side_px, tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    row_bytes = side_px // 8 + 1
    path.write_bytes(png_file(side_px, side_px, bits=1, colour=0, rows=bytes(row_bytes * side_px)))
    assert path.stat().st_size < 60_000
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    peak_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(BadImage, match=r"max_px") as caught:
        open_image(path)
    assert time.perf_counter() - start < 0.5  # 0.001 s on a quiet machine, promised in 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before_kib < 20 * 1024
    assert decoded == []
    assert f"{side_px**2:,}" in str(caught.value) or f"{side_px**2}" in str(caught.value)


def test_max_px_is_the_largest_picture_accepted():
    assert open_image(PNG, max_px=24 * 16).size == (24, 16)
    with pytest.raises(BadImage, match="24 x 16 = 384 pixels, more than max_px = 383"):
        open_image(PNG, max_px=24 * 16 - 1)


def test_pillows_warnings_do_not_escape_and_filters_are_restored():
    before = list(warnings.filters)
    wide = png_file(9_500, 9_500, bits=1, colour=0, rows=bytes(1189 * 9_500))  # Pillow warns from 89 Mpx on
    with pytest.raises(BadImage):
        open_image(wide)
    assert open_image(wide, max_px=100_000_000).size == (9_500, 9_500)  # a warning is an error in this suite
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["mean", "ramp"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white(kind):
    levels = np.full((8, 64), 20_000) if kind == "mean" else np.linspace(0, 65_535, 512).astype(int).reshape(8, 64)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    image = open_image(png_file(64, 8, bits=16, colour=0, rows=rows))
    seen = np.asarray(image) / 255
    assert abs(seen.mean() - levels.mean() / 65_535) < 0.004
    assert np.abs(seen - (levels / 65_535)[..., None]).max() <= 0.5 / 255 + 1e-9


def test_sixteen_bit_colour_is_right_to_a_level():
    levels = np.random.default_rng(1).integers(0, 65_536, (8, 16, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    seen = np.asarray(open_image(png_file(16, 8, bits=16, colour=2, rows=rows))) / 255
    assert np.abs(seen - levels / 65_535).max() < 1 / 255 + 1e-9


def test_modes_become_rgb_with_the_right_values():
    red, half = (255, 0, 0), (255, 127, 127)  # half-transparent red on white
    size = (16, 16)
    cases = {
        "1": (Image.new("1", size, 1), "PNG", (255, 255, 255)),
        "L": (Image.new("L", size, 100), "PNG", (100, 100, 100)),
        "LA": (Image.new("LA", size, (0, 0)), "PNG", (255, 255, 255)),
        "RGBA": (Image.new("RGBA", size, (*red, 128)), "PNG", half),
        "RGBA in WebP": (Image.new("RGBA", size, (*red, 128)), "WEBP", half),
        "P": (Image.new("RGB", size, red).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", red),
        "CMYK": (Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG", red),
        "16-colour GIF": (Image.new("RGB", size, red).quantize(16), "GIF", red),
    }
    for name, (image, kind, colour) in cases.items():
        options = {"lossless": True} if kind == "WEBP" else {}
        seen = open_image(encoded(image, kind, **options))
        assert seen.mode == "RGB", name
        assert np.abs(np.asarray(seen).astype(int) - colour).max() <= 1, name


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        seen = open_image(encoded(image, kind, transparency=0))
        assert seen.getpixel((0, 0)) == (255, 255, 255)
        assert seen.getpixel((1, 1)) == (0, 255, 0)


def test_adobes_inverted_cmyk_is_not_a_negative():
    plain = encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")  # no ink: white; Pillow writes Adobe's way
    assert b"Adobe" in plain
    assert open_image(plain).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert open_image(content).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_once(orientation):
    upright = Image.new("L", (2, 3))
    upright.putdata([0, 50, 100, 150, 200, 250])
    stored_as = {  # what a camera writes for each tag: the inverse of the turn that the EXIF standard asks of a viewer
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(stored_as[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = open_image(encoded(stored, "PNG", exif=exif))
    assert seen.convert("L").tobytes() == upright.tobytes()
    assert 0x0112 not in seen.getexif()


def test_broken_metadata_does_not_spoil_a_good_picture():
    tiff = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + b"\x11\x12\x13\x14" * 40
    assert open_image(encoded(noise(), "JPEG", exif=b"Exif\0\0" + tiff)).size in ((24, 16), (16, 24))
    for kind in ("JPEG", "PNG", "WEBP"):  # Pillow raises SyntaxError for the last two
        assert open_image(encoded(noise(), kind, exif=b"Exif\0\0junk and more")).size == (24, 16)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


LONG = zlib.compress(bytes(2 << 20))
METADATA = {  # each is refused by Pillow 13, together with the picture
    "long zTXt": chunk(b"zTXt", b"k\0\0" + LONG),
    "long iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + LONG),
    "long iCCP": chunk(b"iCCP", b"k\0\0" + LONG),
    "much tEXt": b"".join(chunk(b"tEXt", b"k%d\0" % i + bytes(1 << 20)) for i in range(66)),
    "damaged tEXt": chunk(b"tEXt", b"k\0words")[:-1] + b"\0",
    "short pHYs": chunk(b"pHYs", b"a"),
    "short gAMA": chunk(b"gAMA", b""),
    "short cHRM": chunk(b"cHRM", b"12"),
    "short sRGB": chunk(b"sRGB", b""),
    "short acTL": chunk(b"acTL", b"1"),
    "short fcTL": chunk(b"fcTL", b"1"),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", METADATA)
def test_no_metadata_makes_a_png_bad(kind, where):
    place = 33 if where == "before" else len(PNG) - 12  # behind IHDR, before IEND
    content = PNG[:place] + METADATA[kind] + PNG[place:]
    if where == "before":
        with pytest.raises((ValueError, OSError)):
            Image.open(io.BytesIO(content)).load()
    assert open_image(content).tobytes() == noise().tobytes()


def test_a_png_cut_off_in_what_follows_its_pixels_is_whole():
    assert open_image(PNG[:-12] + chunk(b"tEXt", b"k\0" + bytes(500))[:60]).tobytes() == noise().tobytes()


def test_what_decides_the_pixels_of_a_png_is_no_metadata():
    with pytest.raises(BadImage, match="tRNS"):
        open_image(PNG[:33] + chunk(b"tRNS", b"") + PNG[33:])


@pytest.mark.parametrize("turned_by", ["eXIf", "iTXt", "nothing"])
def test_a_png_is_turned_upright_beside_metadata_that_is_passed_over(turned_by):
    exif = Image.Exif()
    exif[0x0112] = 6
    turn = {
        "eXIf": chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        "iTXt": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
        "nothing": b"",
    }[turned_by]
    seen = open_image(PNG[:33] + METADATA["long zTXt"] + turn + PNG[33:])
    want = noise() if turned_by == "nothing" else noise().transpose(Image.Transpose.ROTATE_270)
    assert (seen.size, seen.tobytes()) == (want.size, want.tobytes())


def test_a_bomb_in_metadata_is_not_inflated_and_pillows_limits_stay(tmp_path):
    bomb = zlib.compress(bytes(300 << 20))
    path = tmp_path / "a.png"
    path.write_bytes(PNG[:33] + chunk(b"zTXt", b"k\0\0" + bomb) + chunk(b"iCCP", b"k\0\0" + bomb) + PNG[33:])
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES
    peak_before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_image(path).tobytes() == noise().tobytes()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before_kib < 20 * 1024
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)


_OF_JPEG = st.sampled_from([0xE1, 0xE2, 0xE3, 0xED, 0xEF, 0xFE])
_BEGINS = st.sampled_from(
    [
        b"",
        b"ICC_PROFILE\0",
        b"MPF\0",
        b"MPF\0II*\0\x08\0\0\0",
        b"Photoshop 3.0\0008BIM",
        b"Exif\0\0",
        b"http://ns.adobe.com/xap/1.0/\0",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_OF_JPEG, _BEGINS, st.binary(max_size=60)), min_size=1, max_size=4))
def test_no_metadata_makes_a_jpeg_bad(segments):
    inserted = b"".join(segment(marker, begin + body) for marker, begin, body in segments)
    assert open_image(JPEG[:20] + inserted + JPEG[20:]).convert("RGB").size in ((24, 16), (16, 24))


@pytest.mark.parametrize(
    "inserted",
    [segment(0xE2, b"ICC_PROFILE\0"), segment(0xE0, b"JFIF"),
     segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 60_000) * 20],
    ids=["icc", "jfif", "xmp"],
)  # fmt: skip
def test_pixels_of_a_jpeg_are_the_same_with_broken_metadata(inserted):
    assert open_image(JPEG[:20] + inserted + JPEG[20:]).tobytes() == open_image(JPEG).tobytes()


@pytest.mark.parametrize("key", ["exif", "icc_profile", "xmp"])
@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "PNG"])
def test_metadata_of_three_megabytes_changes_no_pixel(kind, key):
    junk = random.Random(0).randbytes(
        60_000 if (kind, key) == ("JPEG", "xmp") or (kind, key) == ("JPEG", "exif") else 3 << 20
    )
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = open_image(encoded(noise(), kind, **options))
    assert open_image(encoded(noise(), kind, **options, **{key: junk})).tobytes() == plain.tobytes()


def test_errors_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "the file is empty")))
    assert (type(error), error.name, error.reason) == (BadImage, "a.jpg", "the file is empty")
    fault = pickle.loads(pickle.dumps(DiskFault("a.jpg", "cannot be read: Stale file handle")))
    assert (type(fault), str(fault)) == (DiskFault, "a.jpg: cannot be read: Stale file handle")


# ---- lists of pictures


def test_the_digits_are_split_once_and_for_all():
    train, test = data.digits()
    assert (len(train), len(test), train.classes) == (1437, 360, tuple("0123456789"))
    assert len({*train.names, *test.names}) == 1797
    assert test.names[:4] == ["digits/0021", "digits/0024", "digits/0028", "digits/0034"]
    for images in (train, test):
        shares = np.bincount(images.labels, minlength=10) / len(images)
        assert np.abs(shares - 0.1).max() < 0.006
        data.check_labels(images)
    again = data.digits()[1]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  # the ambient generator is the point
    assert again.names == data.digits()[1].names
    assert again.load(3).tobytes() == test.load(3).tobytes()


def test_a_digit_has_all_its_grey_levels():
    train, _ = data.digits()
    first = train.load(0)
    assert (first.mode, first.size) == ("L", (8, 8))
    levels = {level for index in range(100) for level in train.load(index).tobytes()}
    assert levels == {round(step * 255 / 16) for step in range(17)}


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install lambdanets\[digits\]"):
        data.digits()


def fill(root: Path, files: dict[str, int], *, content: bytes = PNG) -> Path:
    """Writes n pictures into each folder."""
    for place, n in files.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(n):
            (root / place / f"{index}.png").write_bytes(content)
    return root


def test_train_and_val_are_taken_as_given(tmp_path):
    fill(tmp_path, {"train/2": 3, "train/10": 2, "train/2/deep/er": 1, "val/10": 1, "val/2": 2, "test/2": 5})
    found = data.folder(tmp_path)
    assert found.train.classes == found.val.classes == ("2", "10")  # natural order
    assert found.train.names == ["train/2/0.png", "train/2/1.png", "train/2/2.png", "train/2/deep/er/0.png",
                                 "train/10/0.png", "train/10/1.png"]  # fmt: skip
    assert found.train.labels == [0, 0, 0, 0, 1, 1]
    assert found.val.names == ["val/2/0.png", "val/2/1.png", "val/10/0.png"]
    assert "train/ and val/ as given: 6 training and 3 validation images of 2 classes" in found.how
    assert found.ignored == {}
    assert found.train.load(3).tobytes() == noise().tobytes()


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val"])
def test_the_validation_folder_is_named_in_how(name, tmp_path):
    found = data.folder(fill(tmp_path, {"train/a": 2, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1}))
    assert len(found.val) == 2
    assert f"train/ and {name}/ as given" in found.how


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Training", "Testing"), ("TRAIN", "TEST"), ("train", "dev"), ("train", "eval"), ("training", "validation"),
        ("Train_images", "Val_images"), ("train2017", "val2017"), ("training_set", "test_set"), ("trainset", "testset"),
        ("TrainImages", "TestImages"), ("train-data", "validation-data"), ("seg_train", "seg_test"), ("trn", "tst"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("01 train", "02 test"), ("trains", "tests"),
        ("train", "evaluation"),
        ("Training Data", "Holdout Data"), ("trainval", "test"), ("asl_alphabet_train", "asl_alphabet_test"),
    ],
)  # fmt: skip
def test_the_parts_of_a_data_set_are_known_as_people_call_them(train, val, tmp_path):
    for name, n in ((train, 3), (val, 2)):
        fill(tmp_path, {f"{name}/cat": n, f"{name}/dog": n})
    found = data.folder(tmp_path)
    assert found.train.classes == found.val.classes == ("cat", "dog")
    assert (found.train.labels, found.val.labels) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert {name.split("/")[0] for name in found.train.names} == {train}
    assert {name.split("/")[0] for name in found.val.names} == {val}
    assert f"{train}/ and {val}/ as given" in found.how
    assert "not used" not in found.how
    images, how = data.val_or_all(tmp_path)
    assert (images.names, images.classes) == (found.val.names, found.val.classes)
    assert str(tmp_path / val) in how


@pytest.mark.parametrize(
    ("parts", "chosen", "unused"),
    [
        (["train", "val", "test"], "val", "test/"),
        (["train", "dev", "test"], "test", "dev/"),  # the first four spellings before all others
        (["training", "evaluation", "validation"], "validation", "evaluation/"),
        (["train", "Testing", "dev", "extra"], "dev", "Testing/, extra/"),
        (["train", "test", "train_10", "valid"], "valid", "test/, train_10/"),
        (["seg_train", "seg_test", "seg_pred"], "seg_test", "seg_pred/"),
    ],
)
def test_of_several_held_out_folders_one_is_used_and_what_else_lies_there_is_said(parts, chosen, unused, tmp_path):
    fill(tmp_path, {f"{part}/{of}": 2 for part in parts for of in ("a", "b")})
    (tmp_path / "labels.csv").touch()
    (tmp_path / "loose.png").write_bytes(PNG)
    (tmp_path / ".cache").mkdir()
    found = data.folder(tmp_path)
    assert {name.split("/")[0] for name in found.val.names} == {chosen}
    assert found.how.endswith(f"; not used, though beside: {unused}")
    assert {why: names for why, (_, names) in found.ignored.items()} == {
        "hidden or system": [".cache/"],
        "no image suffix": ["labels.csv"],
        "outside a class folder": ["loose.png"],
    }
    images, how = data.val_or_all(tmp_path)
    assert images.names == found.val.names
    assert unused in how


@pytest.mark.parametrize("beside", [{"unlabelled": 4}, {"extra/a": 4}, {"dev": 3}])
def test_what_lies_beside_a_train_folder_alone_is_said(beside, tmp_path):
    fill(tmp_path, {"train/a": 4, "train/b": 4, **beside})
    found = data.folder(tmp_path)
    (name,) = {place.split("/")[0] for place in beside}
    assert found.how.endswith(f"; not used, though beside: {name}/")
    assert len(found.train) + len(found.val) == 8


@pytest.mark.parametrize(
    "names",
    [
        ["bus", "train", "tram"], ["steam_train", "bullet_train"], ["test_tube", "flask"], ["dev", "prod"],
        ["valid_ticket", "expired"], ["tr", "de"], ["evaluation", "planning"], ["trains", "buses"],
        ["training", "match"],
        ["testing", "production"], ["images", "drawings"], ["mask", "no_mask"], ["crash test", "road"],
    ],
)  # fmt: skip
def test_classes_that_are_called_so_stay_classes(names, tmp_path):
    fill(tmp_path, dict.fromkeys(names, 4))
    assert data.folder(tmp_path).train.classes == tuple(sorted(names))


@pytest.mark.parametrize("names", [["trains", "buses"], ["dev", "prod"], ["tr", "de"], ["bullet_train", "steam_train"]])
def test_classes_with_folders_in_them_stay_classes(names, tmp_path):
    fill(tmp_path, {f"{names[0]}/2019": 4, f"{names[0]}/2020": 4, f"{names[1]}/2020": 4, f"{names[1]}/front/left": 2})
    found = data.folder(tmp_path)
    assert found.train.classes == tuple(sorted(names))
    assert len(found.train) + len(found.val) == 14


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"A/cat": 3, "A/dog": 3, "B/cat": 3, "B/dog": 3}, ["two ways", "A, B", "cat, dog", "rename", "folder train/"]),
        ({f"{of}/{side}/x": 3 for of in "abc" for side in ("front", "back")}, ["two ways", "back, front", "train/a"]),
        ({"tr/a": 2, "tr/b": 2, "te/a": 2, "te/b": 2}, ["two ways", "te, tr"]),
        ({"A/cat": 9, "A/dog": 9, "B/cat": 9, "B/dog": 9, "A": 1}, ["two ways"]),
        ({"cup/train": 3, "cup/test": 3, "pen/train": 2, "pen/test": 2, "pen/x": 1}, ["the parts come first"]),
        ({"Training": 5, "Testing": 5}, ["Testing/", "no train/"]),
        ({"val": 5, "test": 5}, ["test/, val/", "no train/"]),
        ({"Testing/a": 5, "Testing/b": 5}, ["Testing/", "no train/", "if it is a class"]),
        ({"Training/a": 3, "Training/b": 3, "Other/c": 3}, ["two ways", "Training/", "Other", "Rename"]),
        ({"train2014/a": 2, "train2014/b": 2, "train2017/a": 2, "train2017/b": 2}, ["2 training folders", "join"]),
        (
            {"train/a": 2, "train/b": 2, "test1/a": 2, "test1/b": 2, "test2/a": 2},
            ["2 held-out folders", "test1, test2"],
        ),
        ({"train/a": 2, "train/b": 2, "Train/a": 2, "Train/b": 2}, ["2 training folders", "Train, train"]),
        ({"images": 5, "masks": 5}, ["masks", "same names", "0, 1, 2"]),
        ({"Images": 5, "Ground Truth": 5}, ["Ground Truth"]),
        ({"asl_train": 5, "asl_test": 5}, ["asl_test/", "no train/"]),
        ({"train": 5, "dev": 5, "tram": 5}, ["dev/", "no train/"]),
        ({"train/images": 5, "train/masks": 5}, ["masks", "same names"]),
        ({"covid/images": 5, "covid/masks": 5, "normal/images": 5, "normal/masks": 5}, ["covid/masks"]),
        ({"train/covid/images": 5, "train/covid/masks": 5, "train/normal/images": 5}, ["covid/masks"]),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_what_to_do(files, words, tmp_path):
    fill(tmp_path, files)
    with pytest.raises(BadData) as caught:
        data.folder(tmp_path)
    for word in words:
        assert word in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_all_hold_the_same_are_classes_where_they_lie_in_train(tmp_path):
    fill(tmp_path, {f"train/{of}/{side}": 5 for of in ("shoe", "boot") for side in ("left", "right")})
    assert data.folder(tmp_path).train.classes == ("boot", "shoe")


def test_masks_beside_pictures_of_other_names_are_a_class(tmp_path):
    fill(tmp_path, {"images": 6, "masks": 0})
    for index in range(6):
        (tmp_path / "masks" / f"carnival{index}.png").write_bytes(PNG)
    assert data.folder(tmp_path).train.classes == ("images", "masks")
    for index in range(6):
        (tmp_path / "masks" / f"{index}_mask.png").write_bytes(PNG)
    with pytest.raises(BadData, match="same names"):
        data.folder(tmp_path)


def test_training_pictures_are_not_evaluated_unasked(tmp_path):
    fill(tmp_path, {"train/a": 3, "train/b": 3})
    with pytest.raises(BadData, match=f"no held-out folder beside it: to take all of that, give {tmp_path}/train"):
        data.val_or_all(tmp_path)
    assert len(data.val_or_all(tmp_path / "train")[0]) == 6


_TOP = st.sampled_from(
    "train val test Training Testing dev val2017 seg_train seg_test cat dog images masks".split()  # noqa: SIM905
)
_INNER = st.sampled_from([["a", "b"], ["a", "b", "c"], [""]]) | st.lists(
    st.sampled_from(["a", "b", "front", "train", "masks", "images", ""]), max_size=3
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_TOP, _INNER, min_size=1, max_size=4), st.integers(2, 3))
def test_of_any_folder_each_picture_is_used_or_said_and_its_label_is_its_folder(tree, n):
    with tempfile.TemporaryDirectory() as place:
        root = fill(Path(place), {f"{top}/{of}": n for top, inner in tree.items() for of in inner}, content=b"")
        try:
            found = data.folder(root)
        except BadData as error:
            assert place in str(error)
            event("refused")
            return
    labels = {
        name: images.classes[label]
        for images in (found.train, found.val)
        for name, label in zip(images.names, images.labels, strict=True)
    }
    assert len(labels) == len(found.train) + len(found.val)
    in_parts = " as given" in found.how or f"of each class of {place}/" in found.how
    event("in parts" if in_parts else "classes")
    for name, label in labels.items():
        assert label == name.split("/")[1 if in_parts else 0]
    unused = found.how.partition("though beside: ")[2].split(", ")
    ignored = {name for _, names in found.ignored.values() for name in names}
    for top, inner in tree.items():
        names = {f"{top}/{of}/{index}.png".replace("//", "/") for of in inner for index in range(n)}
        if f"{top}/" in unused:
            assert not names & set(labels)
        else:
            assert names <= set(labels) | ignored


# ---- one file, one label


def linked(kind, new: Path, old: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    if kind == "hard":
        os.link(old, new)
    elif kind == "file":
        new.symlink_to(old)
    else:  # of a folder
        new.symlink_to(old.parent, target_is_directory=True)


@pytest.mark.parametrize("kind", ["hard", "file", "folder"])
@pytest.mark.parametrize("place", ["a", "train/a"])
def test_one_file_in_a_class_counts_once_and_that_is_said(kind, place, tmp_path):
    beside = place.replace("a", "b") if place == "a" else "train/b"
    fill(tmp_path, {f"{place}/deep": 4, beside: 4})
    linked(kind, tmp_path / place / "again.png", tmp_path / place / "deep" / "0.png")
    if kind == "folder":
        (tmp_path / place / "again.png").rename(tmp_path / place / "again")
    found = data.folder(tmp_path)
    assert len(found.train) + len(found.val) == 8
    assert sum("by a link" in why for why in found.ignored) == 1
    assert next(files for why, (files, _) in found.ignored.items() if "by a link" in why) == 1


@pytest.mark.parametrize("kind", ["hard", "file", "folder"])
@pytest.mark.parametrize(
    ("here", "there"),
    [("b/again.png", "a/0.png"), ("val/a/again.png", "train/a/0.png"), ("val/b/0/again.png", "train/a/0.png")],
)
def test_a_file_under_two_labels_or_in_both_parts_is_refused_with_both_names(kind, here, there, tmp_path):
    if "train" in there:
        fill(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2})
    else:
        fill(tmp_path, {"a": 3, "b": 3})
    linked(kind, tmp_path / here, tmp_path / there)
    name = here if kind != "folder" else f"{here}/0.png"
    with pytest.raises(BadData, match="two labels, or") as caught:
        data.folder(tmp_path)
    assert name in str(caught.value)
    assert there in str(caught.value)
    assert ("3 file(s)" if kind == "folder" else "1 file(s)") in str(caught.value)
    if "train" not in there:
        with pytest.raises(BadData, match="two labels, or"):
            data.val_or_all(tmp_path)


@pytest.mark.parametrize("target", ["..", "../..", ".", "/"])
def test_a_link_to_a_folder_above_is_not_followed_and_said(target, tmp_path):
    root = fill(tmp_path / "set", {"a": 4, "b": 4})
    (root / "a" / "up").symlink_to(target, target_is_directory=True)
    found = data.folder(root)
    assert len(found.train) + len(found.val) == 8
    assert found.ignored["a link to a folder above"] == (1, ["a/up/"])


def test_a_class_that_is_a_link_to_the_data_set_is_none(tmp_path):
    fill(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "all").symlink_to(".")
    assert data.folder(tmp_path).train.classes == ("a", "b")


def test_links_that_lead_to_each_other_end(tmp_path):
    root = fill(tmp_path / "set", {"a": 4, "b": 4})
    fill(tmp_path, {"one": 2, "two": 2})
    (root / "a" / "out").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "to").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "to").symlink_to(tmp_path / "one")
    found = data.folder(root)
    assert {n for n in (*found.train.names, *found.val.names) if "out" in n} == {
        "a/out/0.png", "a/out/1.png", "a/out/to/0.png", "a/out/to/1.png",
    }  # fmt: skip
    assert found.ignored["a link to a folder above"].first_names == ["a/out/to/to/"]


def test_a_link_that_leads_nowhere_is_a_fault_of_the_disk_found_before_training(tmp_path, no_pauses):
    fill(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "gone.png").symlink_to("/mnt/away/1.png")
    (tmp_path / "b" / "circle").symlink_to("circle")
    with pytest.raises(DiskFault, match=r"a/gone\.png: is a link whose target cannot be read: No such file"):
        data.folder(tmp_path)


def test_a_folder_that_cannot_be_listed_for_a_moment_is_listed(tmp_path, monkeypatch, no_pauses):
    fill(tmp_path, {"a": 4, "b": 4})
    want, real, asked = data.folder(tmp_path).train.names, os.scandir, []

    def refuses(path):
        if str(path).rstrip("/").endswith("b"):
            asked.append(path)
            if len(asked) <= 3:
                raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuses)
    assert data.folder(tmp_path).train.names == want
    asked.clear()
    monkeypatch.setattr(files, "PAUSES_S", ())
    with pytest.raises(DiskFault, match="cannot be listed: Permission denied"):
        data.folder(tmp_path)


def test_a_disk_that_gives_all_files_one_number_in_its_lists_is_asked_for_each(tmp_path, monkeypatch):
    fill(tmp_path, {"a": 4, "b": 4})
    want = data.folder(tmp_path).train.names

    class Entry:
        def __init__(self, entry):
            self.name, self.path, self.is_dir, self.is_symlink = entry.name, entry.path, entry.is_dir, entry.is_symlink

        def inode(self):
            return 2**32 - 1

    real = listing_of_a_folder._entries
    monkeypatch.setattr(
        listing_of_a_folder, "_entries", lambda place: (real(place)[0], [Entry(e) for e in real(place)[1]])
    )
    found = data.folder(tmp_path)
    assert (found.train.names, found.ignored) == (want, {})


def test_a_class_missing_or_empty_in_val_shifts_no_label(tmp_path):
    fill(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "val/a": 0, "val/c": 1})
    found = data.folder(tmp_path)
    assert found.val.classes == ("a", "b", "c")
    assert found.val.labels == [2]
    assert "no validation images of a, b" in found.how


def test_hidden_and_foreign_files_are_ignored_and_counted(tmp_path):
    fill(tmp_path, {"train/a": 3, "train/b": 3, "train/.ipynb_checkpoints": 2, "train/__MACOSX/a": 2,
                    "train/a/.ipynb_checkpoints": 2, "val/a": 1, "val/b": 1, "val/.cache": 1})  # fmt: skip
    for name in ("train/.DS_Store", "train/a/.DS_Store", "train/a/._0.png", "train/a/Thumbs.db", "train/b/notes.txt",
                 "train/b/scan.tif", "train/loose.png"):  # fmt: skip
        (tmp_path / name).write_bytes(b"x")
    found = data.folder(tmp_path)
    assert found.train.classes == ("a", "b")
    assert (len(found.train), len(found.val)) == (6, 2)
    assert {why: files for why, (files, _) in found.ignored.items()} == {
        "hidden or system": 8,
        "no image suffix": 2,
        "outside a class folder": 1,
    }
    assert found.ignored["hidden or system"].first_names[0] == "train/.DS_Store"
    assert "train/.ipynb_checkpoints/" in found.ignored["hidden or system"].first_names
    assert found.ignored["no image suffix"].first_names == ["train/b/notes.txt", "train/b/scan.tif"]
    json.dumps(found.ignored)


def test_an_archive_beside_the_classes_is_passed_over(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "photos.tar").touch()
    assert data.folder(tmp_path).ignored["no image suffix"].first_names == ["photos.tar"]


def test_ignored_names_are_at_most_ten(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    for index in range(25):
        (tmp_path / "a" / f"{index}.txt").touch()
    files, names = data.folder(tmp_path).ignored["no image suffix"]
    assert (files, len(names)) == (25, 10)


def test_every_suffix_is_found_in_any_case(tmp_path):
    fill(tmp_path, {"a": 0, "b": 1})
    (tmp_path / "b" / "1.png").write_bytes(PNG)
    for suffix in listing_of_a_folder.IMAGE_SUFFIXES:
        (tmp_path / "a" / f"1{suffix.upper()}").write_bytes(PNG)
    found = data.folder(tmp_path)
    assert len(found.train) + len(found.val) == len(listing_of_a_folder.IMAGE_SUFFIXES) + 2


@pytest.mark.parametrize("top", ["", "train/"])
def test_without_val_each_class_is_split_by_name(top, tmp_path):
    fill(tmp_path, {f"{top}a": 300, f"{top}b": 300, f"{top}c": 2})
    found = data.folder(tmp_path, val_frac=0.2, seed=3)
    names = {*found.train.names, *found.val.names}
    assert len(names) == len(found.train) + len(found.val) == 602
    held = np.bincount(found.val.labels, minlength=3)
    assert abs(held[0] - 60) < 25
    assert abs(held[1] - 60) < 25
    assert held[2] == 1
    assert f"{len(found.train)} training and {len(found.val)} validation images of 3 classes" in found.how
    assert "20.0% of each class" in found.how
    assert data.folder(tmp_path, val_frac=0.2, seed=3).val.names == found.val.names
    assert data.folder(tmp_path, val_frac=0.2, seed=4).val.names != found.val.names


def test_a_new_file_moves_no_other_across_the_split(tmp_path):
    fill(tmp_path, {"a": 100, "b": 100})
    before = data.folder(tmp_path)
    for index in range(50):
        (tmp_path / "a" / f"new{index}.png").write_bytes(PNG)
    (tmp_path / "b" / "0.png").unlink()
    fill(tmp_path, {"0": 30})
    after = data.folder(tmp_path)
    old = {*before.train.names, *before.val.names} - {"b/0.png"}
    assert set(after.val.names) & old == set(before.val.names) - {"b/0.png"}
    assert any("new" in name for name in after.val.names)


@pytest.mark.parametrize("val_frac", [1e-9, 1 - 1e-9])
def test_a_small_class_keeps_an_image_on_either_side(val_frac, tmp_path):
    found = data.folder(fill(tmp_path, {"a": 2, "b": 3}), val_frac=val_frac)
    assert set(found.train.labels) == set(found.val.labels) == {0, 1}
    assert len(found.train) + len(found.val) == 5


def test_the_split_does_not_depend_on_the_place_of_the_folder(tmp_path):
    one, two = (data.folder(fill(tmp_path / place, {"a": 40, "b": 40})) for place in ("here", "there"))
    assert one.val.names == two.val.names
    assert one.val.names[:3] == [
        "a/13.png",
        "a/18.png",
        "a/22.png",
    ]  # and it is this split on every machine, in every release


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no images", "PATH/CLASS"]),
        ({"a": 0, "b": 0}, ["no images"]),
        ({"a": 5}, ["only one class", "a", "two"]),
        ({"a": 5, "b": 0}, ["no images", "b", "add or remove"]),
        ({"train/a": 5, "train/b": 0, "val/a": 1}, ["no images", "train", "b"]),
        ({"train/a": 5, "train/b": 5, "val/a": 0}, ["no images", "val", "fill it"]),
        ({"train/a": 5, "train/b": 5, "val/a": 1, "val/z": 1}, ["lacks: z", "a, b", "rename or remove"]),
        ({"a": 5, "b": 1}, ["b", "one image", "add images"]),
        ({"val/a": 5, "val/b": 5}, ["val", "no train/"]),
        ({"train": 5, "val": 5}, ["val", "no train/"]),
    ],
)
def test_an_unusable_folder_says_what_was_found_and_what_to_do(files, words, tmp_path):
    with pytest.raises(BadData) as caught:
        data.folder(fill(tmp_path / "set", files) if files else tmp_path)
    for word in words:
        assert word in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    with pytest.raises(BadData, match="does not exist"):
        data.folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BadData, match="is not a folder"):
        data.folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"val_frac is 1\.5"):
        data.folder(tmp_path, val_frac=1.5)


def test_a_class_may_be_called_train(tmp_path):
    found = data.folder(fill(tmp_path, {"bus": 4, "train": 4, "tram": 4}))
    assert found.train.classes == ("bus", "train", "tram")


def test_links_are_followed_and_loops_end(tmp_path):
    fill(tmp_path, {"set/a": 4, "set/b/deep": 4, "elsewhere": 3})
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "deep" / "top").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    found = data.folder(tmp_path / "set")
    names = [*found.train.names, *found.val.names]
    assert found.train.classes == ("a", "b", "c")
    assert sum(name.startswith("c/") for name in names) == 3
    assert {"b/deep/0.png", "b/deep/3.png"} <= set(names)
    assert len(names) < 50


@dataclass(frozen=True, eq=False)
class Numbered(Images):
    """Picture i is one grey level, i; those in `broken` cannot be read."""

    broken: frozenset[int] = frozenset()

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise BadImage(self.names[index], "the file is empty")
        return Image.new("L", (8, 8), index % 256)


@dataclass(frozen=True, eq=False)
class Same(Images):
    """Every picture is this one."""

    image: Image.Image

    def load(self, index: int) -> Image.Image:
        return self.image


@dataclass(frozen=True, eq=False)
class Away(Images):
    """Picture i is one grey level, i; the disk of picture 33 is away while there is such a file."""

    switch: Path
    error: Exception

    def load(self, index: int) -> Image.Image:
        if index == 33 and self.switch.exists():
            raise self.error
        return Image.new("L", (8, 8), index % 256)


def numbered(n_images: int, broken: tuple[int, ...] = ()) -> Numbered:
    names = [f"class{i % 3}/{i:04d}.png" for i in range(n_images)]
    return Numbered(("class0", "class1", "class2"), names, [i % 3 for i in range(n_images)], frozenset(broken))


@pytest.mark.parametrize("label", [3, -1, -100])
def test_a_label_out_of_range_names_sample_label_and_range(label):
    images = numbered(9)
    images.labels[4] = label
    for check in (data.check_labels, lambda bad: Batches(bad, GREY, batch_images=2, training=False)):
        with pytest.raises(
            BadData, match=rf"class1/0004\.png has the label {label}: labels run from 0 to 2 \(3 classes\)"
        ):
            check(images)
    with pytest.raises(BadData, match="9 names but 8 labels"):
        data.check_labels(replace(images, labels=[0] * 8))


# ---- one picture to one tensor


def test_normalised_values_are_those_of_the_definition():
    seen = COLOUR.evaluate(Image.new("RGB", (20, 30), (255, 51, 0)))
    assert seen.shape == (3, 8, 8)
    assert seen.dtype == torch.float32
    expected = torch.tensor([(1 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (0 - 0.3) / 0.5])[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (100, 9), (9, 100), (5, 6)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_frac", [0.875, 1.0, 0.7])
def test_evaluate_equals_torchvisions_resize_and_centre_crop(size, interpolation, crop_frac):
    view = replace(COLOUR, image_px=16, interpolation=interpolation, crop_frac=crop_frac)
    mode = v2.InterpolationMode(interpolation)
    steps = [
        v2.Resize(round(16 / crop_frac), mode),
        v2.CenterCrop(16),
        v2.PILToTensor(),
        v2.ToDtype(torch.float, scale=True),
    ]
    peer = v2.Compose([*steps, v2.Normalize(view.mean, view.std)])
    image = noise(*size).point(lambda level: 64 + level // 2)  # no overshoot: Pillow clips between its two passes
    one_level = 1 / 255 / min(view.std)
    torch.testing.assert_close(view.evaluate(image), peer(image), rtol=0, atol=2.01 * one_level)


def test_a_very_long_picture_costs_no_memory():
    line = Image.new("RGB", (200_000, 2))
    start = time.perf_counter()
    assert replace(COLOUR, image_px=224).evaluate(line).shape == (
        3,
        224,
        224,
    )  # whole, resized: 5.7 Gpx
    assert time.perf_counter() - start < 2


def test_grey_and_colour_go_either_way():
    assert GREY.evaluate(Image.new("RGB", (8, 8), (255, 255, 255))).shape == (1, 4, 4)
    assert COLOUR.evaluate(Image.new("L", (8, 8), 9)).shape == (3, 8, 8)


def test_a_view_survives_json():
    assert View(**json.loads(json.dumps(asdict(COLOUR)))) == COLOUR
    assert pickle.loads(pickle.dumps(COLOUR)) == COLOUR


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_px": 0}, "image_px is 0"),
        ({"in_channels": 2}, "in_channels is 2"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (0.5, 0.0, 1.0)}, "std"),
        ({"crop_frac": 0.0}, "crop_frac is 0"),
        ({"crop_frac": 1.5}, "crop_frac is 1.5"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
    ],
)
def test_an_impossible_view_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(COLOUR, **change)


def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@pytest.mark.parametrize(("augment", "ops"), [("imagenet", 0), ("imagenet", 2), ("digits", 0)])
@pytest.mark.parametrize("view", [COLOUR, GREY], ids=["colour", "grey"])
def test_augmentation_varies_with_the_seed_and_keeps_shape_and_range(view, augment, ops):
    transform = transforms.training_transform(view, augment=augment, randaugment_ops=ops, randaugment_magnitude=9)
    seen = []
    for seed in range(12):
        seeded(seed)
        seen.append(transform(noise(30, 20)))
        seeded(seed)
        assert torch.equal(transform(noise(30, 20)), seen[-1])  # no other source than what Batches seeds
    assert {tensor.shape for tensor in seen} == {(view.in_channels, view.image_px, view.image_px)}
    assert len({tensor.numpy().tobytes() for tensor in seen}) >= 11
    low, high = (0 - max(view.mean)) / min(view.std), (1 - min(view.mean)) / min(view.std)
    assert all(low <= tensor.min() and tensor.max() <= high for tensor in seen)


def test_imagenet_flips_and_digits_never_do():
    image = Image.new("L", (32, 32))
    image.paste(255, (0, 0, 16, 32))  # white on the left
    for augment, flips in (("imagenet", True), ("digits", False)):
        transform = transforms.training_transform(replace(GREY, image_px=32), augment=augment)
        sides = set()
        for seed in range(30):
            torch.manual_seed(seed)
            tensor = transform(image)
            difference = (tensor[..., 4:12].mean() - tensor[..., -12:-4].mean()).item()
            if abs(difference) > 0.3:
                sides.add(difference > 0)
        assert sides == ({True, False} if flips else {True})


@pytest.mark.parametrize("ops", [0, 2])
@pytest.mark.parametrize("view", [COLOUR, GREY], ids=["colour", "grey"])
def test_the_strengths_of_augmentation_have_the_values_they_had_before_they_could_be_chosen(view, ops):
    steps = [v2.RandomResizedCrop(view.image_px, scale=(0.08, 1)), v2.RandomHorizontalFlip()]
    strength = {"randaugment_ops": ops, "randaugment_magnitude": 9}
    if ops:
        grey = (128,) * 3 if view.in_channels == 3 else 128
        how = {"img_mean": grey, "translate_const": int(0.45 * view.image_px)}
        steps.append(rand_augment_transform("rand-m9-n2-p1.0-mmax10", how))
    before = v2.Compose([view._in_mode, *steps, view._normalised])
    for chosen in ({}, {"flip_frac": 0.5, "min_crop_frac": 0.08}):
        now = transforms.training_transform(view, augment="imagenet", **strength, **chosen)
        for seed in range(20):
            seeded(seed)
            want = before(noise(30, 20))
            seeded(seed)
            assert torch.equal(now(noise(30, 20)), want)


def test_with_no_flips_no_training_view_is_ever_a_mirror_image():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)))  # brighter to the right

    def views(flip_frac, **more):
        transform = transforms.training_transform(
            replace(GREY, image_px=16), augment="imagenet", flip_frac=flip_frac, **more
        )
        for seed in range(100):
            seeded(seed)
            yield transform(ramp)

    never, half, always = (list(views(flip_frac)) for flip_frac in (0.0, 0.5, 1.0))
    assert all((view.diff(dim=-1) >= 0).all() for view in never)
    for one, either, other in zip(never, half, always, strict=True):  # and whatever else is drawn stays
        assert torch.equal(other, one.flip(-1))
        assert torch.equal(either, one) or torch.equal(either, other)
    assert 30 < sum(torch.equal(a, b) for a, b in zip(never, half, strict=True)) < 70
    assert 30 < sum(torch.equal(a, b) for a, b in zip(views(0.3), never, strict=True)) < 90


@pytest.mark.parametrize("min_crop_frac", [0.08, 0.5, 0.9])
def test_no_crop_is_smaller_than_asked(min_crop_frac):
    levels = np.stack(np.meshgrid(np.arange(200), np.arange(200)), -1).astype(np.uint8)
    image = Image.fromarray(np.concatenate([levels, levels[..., :1]], -1))  # a pixel says where it lies
    view = View(image_px=64, in_channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    transform = transforms.training_transform(view, augment="imagenet", min_crop_frac=min_crop_frac)
    areas = []
    for seed in range(60):
        seeded(seed)
        low, high = (transform(image)[:2] * 255).flatten(1).aminmax(dim=1)
        areas.append((high - low + 1).prod().item() / 200**2)
    assert min_crop_frac * 0.9 < min(areas) < min_crop_frac + 0.12
    assert max(areas) > 0.8


@pytest.mark.parametrize(
    "change",
    [
        {"flip_frac": 1.0},
        {"min_crop_frac": 0.9},
        {"erase_frac": 0.9},
        {"randaugment_ops": 1, "randaugment_magnitude": 5},
    ],
)
def test_batches_pass_each_strength_on(change):
    images = numbered(20)
    asked = {"batch_images": 10, "training": True, "augment": "imagenet"}
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1)))
    images = Same(images.classes, images.names, images.labels, ramp)
    plain, changed = (list(Batches(images, GREY, **asked, **more).epoch(0)) for more in ({}, change))
    assert [b.ids for b in plain] == [b.ids for b in changed]
    assert not torch.equal(plain[0].images, changed[0].images)


@pytest.mark.parametrize(
    "asked",
    [{"flip_frac": -0.1}, {"flip_frac": 1.1}, {"min_crop_frac": 0.0}, {"min_crop_frac": 1.5}, {"erase_frac": 2.0}],
)
def test_a_strength_out_of_its_range_is_refused(asked):
    ((name, value),) = asked.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: it must lie"):
        transforms.training_transform(COLOUR, augment="imagenet", **asked)


def test_randaugment_changes_the_picture_and_its_magnitude_matters():
    def mean_change(ops, magnitude):
        plain = transforms.training_transform(COLOUR, augment="imagenet")
        strong = {"randaugment_ops": ops, "randaugment_magnitude": magnitude}
        more = transforms.training_transform(COLOUR, augment="imagenet", **strong)
        change = 0.0
        for seed in range(40):
            seeded(seed)
            before = plain(noise())
            seeded(seed)
            change += (more(noise()) - before).abs().mean().item() / 40
        return change

    assert mean_change(0, 10) == 0
    assert mean_change(2, 10) > 0
    assert mean_change(1, 15) != mean_change(1, 10)  # the published 15 lies beyond the scale, and is not clipped to it


def test_randaugment_fills_what_it_uncovers_with_grey():
    transform = transforms.training_transform(COLOUR, augment="imagenet", randaugment_ops=1, randaugment_magnitude=3)
    for seed in range(60):  # a picture of that grey has no border to be seen, whatever is drawn
        seeded(seed)
        picture = transform(Image.new("RGB", (20, 20), (128, 128, 128)))
        assert torch.equal(picture, picture[:, :1, :1].expand_as(picture))


def test_erasing_makes_a_rectangle_of_noise_by_the_seed_and_leaves_the_rest():
    plain = transforms.training_transform(COLOUR, augment="none")
    never = transforms.training_transform(COLOUR, augment="none", erase_frac=0.0)
    assert torch.equal(never(noise()), plain(noise()))
    half = transforms.training_transform(replace(COLOUR, image_px=32), augment="imagenet", erase_frac=0.5)
    whole = transforms.training_transform(replace(COLOUR, image_px=32), augment="imagenet")
    erased = 0
    for seed in range(60):
        seeded(seed)
        before = whole(noise())
        seeded(seed)
        after = half(noise())
        seeded(seed)
        assert torch.equal(half(noise()), after)
        changed = (after != before).any(dim=0)
        if changed.any():
            erased += 1
            rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
            box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all()
            assert 0.01 < box.numel() / changed.numel() < 0.4
    assert 18 <= erased <= 42
    with pytest.raises(ValueError, match=r"erase_frac is 1\.5"):
        transforms.training_transform(COLOUR, augment="imagenet", erase_frac=1.5)


MIXES = [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}]


@pytest.mark.parametrize("alphas", MIXES, ids=["mixup", "cutmix", "either"])
def test_mixing_is_a_function_of_seed_and_step_on_any_number_of_ranks(alphas):
    images = torch.rand(8, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    kept = images.clone()
    seen = set()
    for step in range(6):
        mixed, targets = transforms.mix(images, labels, classes=8, seed=3, step=step, **alphas)
        torch.manual_seed(step)
        np.random.seed(step)  # noqa: NPY002
        ambient = np.random.get_state()[1].tolist()  # noqa: NPY002
        parts = [
            transforms.mix(images[a : a + 2], labels[a : a + 2], classes=8, seed=3, step=step, **alphas)
            for a in range(0, 8, 2)
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), mixed)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
        assert np.random.get_state()[1].tolist() == ambient  # noqa: NPY002
        share = targets[0, 0].item()
        seen.add(round(share, 6))
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
        for one, other in ((0, 1), (1, 0), (6, 7)):  # neighbours, in the shares that the targets state
            torch.testing.assert_close(targets[one, other], torch.tensor(1 - share))
            blend = share * images[one] + (1 - share) * images[other]
            cut = (mixed[one] == images[other]).all(dim=0)
            assert torch.allclose(mixed[one], blend, atol=1e-6) or abs(cut.float().mean().item() - (1 - share)) < 1e-6
    assert len(seen) > 3
    assert torch.equal(images, kept)


def test_nothing_is_mixed_unasked_and_an_odd_last_image_stays():
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    same_images, targets = transforms.mix(images, labels, classes=3, seed=0, step=0)
    assert same_images is images
    assert torch.equal(targets.argmax(dim=1), labels)
    mixed, targets = transforms.mix(images, labels, classes=3, seed=0, step=0, mixup_alpha=1.0)
    assert torch.equal(mixed[4], images[4])
    assert targets[4].tolist() == [0, 1, 0]
    assert not torch.equal(mixed[3], images[3])
    with pytest.raises(ValueError, match="mixup_alpha is -1"):
        transforms.mix(images, labels, classes=3, seed=0, step=0, mixup_alpha=-1)


def test_no_augmentation_is_the_view_of_evaluation():
    assert torch.equal(transforms.training_transform(COLOUR, augment="none")(noise()), COLOUR.evaluate(noise()))


@pytest.mark.parametrize(
    "asked",
    [
        {"augment": "imagnet"},
        {"augment": "imagenet", "randaugment_ops": 2, "randaugment_magnitude": 16},
        {"augment": "imagenet", "randaugment_ops": -1},
        {"augment": "digits", "randaugment_ops": 2},
    ],
)
def test_an_unknown_augmentation_is_refused(asked):
    with pytest.raises(ValueError, match=r"augment is|randaugment_ops is"):
        transforms.training_transform(COLOUR, **asked)


# ---- batches


def error_of(stream, kind):
    """What reading to the end raises, without its frames: they would keep the workers waiting for the collector."""
    try:
        list(stream)
    except kind as error:
        return error.with_traceback(None)
    pytest.fail(f"no {kind.__name__}")


def same(one: list, two: list) -> bool:
    return len(one) == len(two) and all(
        a.ids == b.ids and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(one, two, strict=True)
    )


def test_evaluation_gives_every_image_once_in_order():
    batches = Batches(numbered(101), GREY, batch_images=25, training=False)
    seen = list(batches.epoch(0))
    assert len(batches) == len(seen) == 5
    assert [len(batch.ids) for batch in seen] == [25, 25, 25, 25, 1]
    assert [index for batch in seen for index in batch.ids] == list(range(101))
    for batch in seen:
        assert batch.images.shape == (len(batch.ids), 1, 4, 4)
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [index % 3 for index in batch.ids]
        assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == batch.ids  # the picture is the one named


@pytest.mark.parametrize(
    ("n_images", "batch_images", "sizes"),
    [(101, 25, [25] * 4), (100, 25, [25] * 4), (26, 25, [25]), (7, 25, [7]), (2, 25, [2]), (3, 1, [1] * 3)],
)
def test_training_batches_are_full_and_no_image_repeats(n_images, batch_images, sizes):
    batches = Batches(numbered(n_images), GREY, batch_images=batch_images, training=True)
    seen = list(batches.epoch(0))
    assert [len(batch.ids) for batch in seen] == sizes
    assert len(batches) == len(sizes)
    ids = [index for batch in seen for index in batch.ids]
    assert len(set(ids)) == len(ids) == sum(sizes)
    for batch in seen:
        assert batch.labels.tolist() == [index % 3 for index in batch.ids]
        assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == batch.ids


@pytest.mark.parametrize("n_images", [2, 3, 5, 64, 101, 4097])
def test_the_order_is_a_permutation_computed_in_any_part(n_images):
    for seed, epoch in ((0, 0), (0, 1), (3, 0)):
        order = order_of.Order(n_images, seed=seed, epoch=epoch)
        whole = order[0:n_images]
        assert sorted(whole.tolist()) == list(range(n_images))
        assert [order[start : start + 7].tolist() for start in range(0, n_images, 7)] == [
            whole[start : start + 7].tolist() for start in range(0, n_images, 7)
        ]


def test_the_order_looks_drawn_by_chance():
    n, epochs = 32, 1500
    places, neighbours = np.zeros((n, n)), np.zeros((n, n))
    for epoch in range(epochs):
        ids = order_of.Order(n, seed=1, epoch=epoch)[0:n]
        places[np.arange(n), ids] += 1
        neighbours[ids[:-1], ids[1:]] += 1
    expected = epochs / n  # of each id at each place, and of each pair of neighbours
    assert 0.8 < ((places - expected) ** 2 / expected).sum() / (n - 1) ** 2 < 1.2
    pairs = neighbours[~np.eye(n, dtype=bool)]
    assert 0.8 < ((pairs - expected) ** 2 / expected).sum() / (n * n - 2 * n) < 1.2  # 2 rounds instead of 12: above 50
    five = {tuple(order_of.Order(5, seed=0, epoch=epoch)[0:5].tolist()) for epoch in range(1500)}
    assert len(five) == 120  # every order occurs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_out_the_batches_of_one_process(training, ranks):
    images = numbered(101)
    whole = [b.ids for b in Batches(images, GREY, batch_images=25, training=training, seed=5).epoch(1)]
    apart = [
        Batches(images, GREY, batch_images=25, training=training, seed=5, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    parts = [[b.ids for b in batches.epoch(1)] for batches in apart]
    assert [len(batches) for batches in apart] == [len(part) for part in parts]
    if training:
        assert [[index for part in parts for index in part[step]] for step in range(4)] == whole
        assert parts[1][2:] == [b.ids for b in apart[1].epoch(1, first_batch=2)]
    else:  # the last batch holds one image: one rank has it, the others have a batch less
        assert sorted(index for part in parts for ids in part for index in ids) == list(range(101))
        assert sorted(len(part) for part in parts) == [4] * (ranks - 1) + [5]
        few = [Batches(numbered(2), GREY, batch_images=8, training=False, rank=r, ranks=ranks) for r in range(ranks)]
        assert sorted(b.ids for batches in few for b in batches.epoch(0)) == ([[0], [1]])


def test_impossible_ranks_are_refused():
    for rank, ranks in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank is {rank} of {ranks}"):
            Batches(numbered(9), GREY, batch_images=4, training=True, rank=rank, ranks=ranks)
    with pytest.raises(ValueError, match="batch_images is 3, of 9 images, for 4 ranks"):
        Batches(numbered(9), GREY, batch_images=3, training=True, rank=0, ranks=4)


def test_a_fingerprint_changes_with_classes_names_labels_and_order():
    images = numbered(9)
    other = [
        replace(images, classes=("class0", "class1", "class9")),
        replace(images, names=[*images.names[:-1], "else.png"]),
        replace(images, labels=[*images.labels[:-1], 0]),
        replace(images, names=images.names[::-1], labels=images.labels[::-1]),
    ]
    assert len({x.fingerprint() for x in (images, numbered(9), *other)}) == 5
    assert numbered(9).fingerprint() == images.fingerprint()


def test_too_few_images_and_impossible_sizes_are_refused():
    with pytest.raises(BadData, match="1 image"):
        Batches(numbered(1), GREY, batch_images=4, training=True)
    with pytest.raises(BadData, match="0 image"):
        Batches(numbered(0), GREY, batch_images=4, training=False)
    assert len(list(Batches(numbered(1), GREY, batch_images=4, training=False).epoch(0))) == 1
    for asked in ({"batch_images": 0}, {"batch_images": 2, "workers": -1}, {"batch_images": 2, "max_bad_frac": 2.0}):
        with pytest.raises(ValueError, match="batch_images is"):
            Batches(numbered(9), GREY, training=True, **asked)


def test_order_and_augmentation_depend_on_seed_and_epoch():
    train, _ = data.digits()

    def epoch(seed, epoch):
        return next(Batches(train, GREY, batch_images=64, training=True, seed=seed, augment="digits").epoch(epoch))

    first = epoch(0, 0)
    assert same([first], [epoch(0, 0)])
    for other in (epoch(1, 0), epoch(0, 1)):
        assert other.ids != first.ids
        both = set(other.ids) & set(first.ids)
        assert all(not torch.equal(other.images[other.ids.index(i)], first.images[first.ids.index(i)]) for i in both)


def test_the_same_bits_for_any_number_of_workers_and_any_ambient_state():
    train, _ = data.digits()
    arguments = {"batch_images": 100, "training": True, "seed": 7, "augment": "digits"}
    alone = Batches(train, GREY, **arguments)
    helped = Batches(train, GREY, workers=2, **arguments)
    expected = [list(alone.epoch(0)), list(alone.epoch(1))]
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)  # noqa: NPY002  # the ambient generator is the point
    before = torch.get_rng_state()
    assert same(list(helped.epoch(0)), expected[0])
    next(helped.epoch(5))  # left after one batch: nothing of it may leak into the next
    assert same(list(helped.epoch(1)), expected[1])
    assert same(list(alone.epoch(0)), expected[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_resumes_at_any_batch(workers):
    batches = Batches(data.digits()[0], GREY, batch_images=300, training=True, augment="digits", workers=workers)
    whole = list(batches.epoch(2))
    assert len(whole) == 4
    assert same(list(batches.epoch(2, first_batch=3)), whole[3:])
    assert list(batches.epoch(2, first_batch=4)) == []


def test_the_ambient_generator_is_restored_between_batches():
    batches = Batches(data.digits()[0], GREY, batch_images=100, training=True, augment="digits")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    stream = batches.epoch(0)
    seen = []
    for _ in range(3):
        next(stream)
        seen.append(torch.rand(1))
    assert torch.equal(torch.cat(seen), expected)


def test_a_second_epoch_ends_the_first_with_an_error():
    batches = Batches(numbered(20), GREY, batch_images=5, training=True)
    first = batches.epoch(0)
    next(first)
    assert len(list(batches.epoch(1))) == 4
    with pytest.raises(RuntimeError, match="epoch 0 is no longer read"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_a_function_of_seed_epoch_and_id(workers, tmp_path):
    images = numbered(200, broken=(17, 130))
    bad_file = tmp_path / "bad_samples.jsonl"

    def batches(seed=0, **more):
        return Batches(images, GREY, batch_images=50, training=True, seed=seed, max_bad_frac=0.01, **more)

    helped = batches(workers=workers, bad_file=bad_file)
    seen = list(helped.epoch(0))
    assert [len(batch.ids) for batch in seen] == [50] * 4
    ids = [index for batch in seen for index in batch.ids]
    good = list(Batches(numbered(200), GREY, batch_images=50, training=True).epoch(0))
    wanted = [index for batch in good for index in batch.ids]
    replaced = {want: got for want, got in zip(wanted, ids, strict=True) if want != got}
    assert set(replaced) == {17, 130}  # only those two
    assert not set(replaced.values()) & {17, 130}
    for batch in seen:  # the substitute brings its own label and picture
        assert batch.labels.tolist() == [index % 3 for index in batch.ids]
        assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == batch.ids
    assert same(seen, list(batches().epoch(0)))
    substitutes = set()
    for seed in range(3):
        for epoch in range(3):
            chosen = [index for batch in batches(seed).epoch(epoch) for index in batch.ids]
            plain = [
                i
                for b in Batches(numbered(200), GREY, batch_images=50, training=True, seed=seed).epoch(epoch)
                for i in b.ids
            ]
            substitutes.add(chosen[plain.index(17)])
    assert len(substitutes) > 4  # no fixed neighbour
    list(helped.epoch(1))
    assert helped.bad == {"class2/0017.png": "the file is empty", "class1/0130.png": "the file is empty"}
    lines = [json.loads(line) for line in bad_file.read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == ["class1/0130.png", "class2/0017.png"]  # once each
    assert {line["reason"] for line in lines} == {"the file is empty"}


def test_a_resumed_run_lists_no_bad_image_twice(tmp_path):
    bad_file = tmp_path / "bad_samples.jsonl"
    bad_file.write_text(
        '{"name": "class2/0017.png", "reason": "the file is empty"}\n{"name": "class1/01'
    )  # killed here
    images = numbered(200, broken=(17, 130))
    batches = Batches(images, GREY, batch_images=50, training=True, max_bad_frac=0.01, bad_file=bad_file)
    list(batches.epoch(0))
    lines = [json.loads(line)["name"] for line in bad_file.read_text().splitlines()]
    assert lines == ["class2/0017.png", "class1/0130.png"]
    assert len(batches.bad) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_stop_training_with_names_and_remedy(workers, tmp_path):
    bad_file = tmp_path / "bad.jsonl"
    images = numbered(120, broken=tuple(range(0, 120, 4)))
    batches = Batches(
        images, GREY, batch_images=60, training=True, max_bad_frac=0.1, bad_file=bad_file, workers=workers
    )
    message = str(error_of(batches.epoch(0), BadData))
    found = len(batches.bad)
    assert 12 < found <= 30
    assert f"{found} of 120 training images cannot be read, 12 allowed" in message
    assert message.count("\n") == message.count(".png: the file is empty") == 10
    assert "max_bad_frac (now 0.1)" in message
    assert str(bad_file) in message
    assert "Traceback" not in message
    assert len(bad_file.read_text().splitlines()) == found


def test_one_bad_image_is_always_allowed_and_two_are_not():
    one = Batches(numbered(50, broken=(3,)), GREY, batch_images=10, training=True, max_bad_frac=0.0)
    assert len(list(one.epoch(0))) == 5
    two = Batches(numbered(50, broken=(3, 4)), GREY, batch_images=10, training=True)
    with pytest.raises(BadData, match="2 of 50 training images cannot be read, 1 allowed"):
        list(two.epoch(0))
    told = Batches(numbered(50, broken=(3, 4)), GREY, batch_images=10, training=True, max_bad_frac=0.05)
    assert len(list(told.epoch(0))) == 5


def test_a_set_without_a_readable_image_ends_with_an_error():
    for frac in (0.001, 1.0):
        with pytest.raises(BadData, match="cannot be read"):
            list(
                Batches(
                    numbered(20, broken=tuple(range(20))), GREY, batch_images=4, training=True, max_bad_frac=frac
                ).epoch(0)
            )


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_replaces_nothing(workers):
    batches = Batches(
        numbered(60, broken=(33,)), GREY, batch_images=20, training=False, workers=workers, max_bad_frac=1.0
    )
    stream = batches.epoch(0)
    assert next(stream).ids == list(range(20))
    error = error_of(stream, BadImage)
    assert (error.name, error.reason) == ("class0/0033.png", "the file is empty")
    assert str(error) == "class0/0033.png: the file is empty"  # also from a worker: no traceback in the text


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "error",
    [DiskFault("class0/0033.png", "cannot be read: Input/output error"), OSError(errno.EIO, "Input/output error")],
    ids=["ours", "systems"],
)
def test_a_fault_of_the_disk_ends_the_epoch_as_it_is_and_nothing_is_concluded_from_it(
    error, training, workers, tmp_path
):
    switch, bad_file, plain = tmp_path / "away", tmp_path / "bad.jsonl", numbered(60)
    away = Away(plain.classes, plain.names, plain.labels, switch, error)
    asked = {"batch_images": 10, "training": training, "workers": workers, "max_bad_frac": 1.0, "bad_file": bad_file}
    batches = Batches(away, GREY, **asked)
    want = list(Batches(plain, GREY, batch_images=10, training=training).epoch(0))
    switch.touch()
    seen, stream = [], batches.epoch(0)
    with pytest.raises(DiskFault) as caught:  # noqa: PT012
        for batch in stream:
            seen.append(batch)
    assert (caught.value.name, caught.value.reason) == ("class0/0033.png", "cannot be read: Input/output error")
    assert len(seen) == next(number for number, batch in enumerate(want) if 33 in batch.ids)
    assert same(seen, want[: len(seen)])
    assert batches.bad == {}
    assert not bad_file.exists()
    switch.unlink()  # and when the disk is back, the epoch goes on where it was, to the bit
    assert same(list(batches.epoch(0, first_batch=len(seen))), want[len(seen) :])


@pytest.mark.parametrize("training", [True, False])
def test_a_listed_file_that_is_gone_is_neither_replaced_nor_excluded(training, tmp_path, no_pauses):
    fill(tmp_path, {"a": 40, "b": 40})
    found = data.folder(tmp_path)
    images = found.train if training else found.val
    (tmp_path / images.names[3]).unlink()
    with pytest.raises(DiskFault, match="No such file") as caught:
        list(Batches(images, COLOUR, batch_images=len(images), training=training, max_bad_frac=1.0).epoch(0))
    assert caught.value.name == images.names[3]


def listing(tmp_path, bad_file, broken=(17, 130)):
    images = numbered(200, broken=broken)
    return Batches(images, GREY, batch_images=50, training=True, max_bad_frac=0.05, bad_file=bad_file)


def names_in(bad_file):
    return [json.loads(line)["name"] for line in bad_file.read_bytes().splitlines()]


BOTH = ["class1/0130.png", "class2/0017.png"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_bad_images_are_listed_on_a_disk_without_locks(code, tmp_path, monkeypatch):
    def refuses(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", refuses)
    assert len(list(listing(tmp_path, tmp_path / "bad.jsonl").epoch(0))) == 4
    assert sorted(names_in(tmp_path / "bad.jsonl")) == BOTH


@pytest.mark.parametrize("fault", ["full", "half a line", "link", "folder", "no folder"])
def test_a_list_of_bad_images_that_cannot_be_written_is_said_once_and_written_later(
    fault, tmp_path, capsys, largest_file, monkeypatch
):
    bad_file = tmp_path / "run" / "bad.jsonl"
    if fault != "no folder":
        bad_file.parent.mkdir()
    if fault == "link":
        (tmp_path / "mine").write_text("mine")
        bad_file.symlink_to(tmp_path / "mine")
    if fault == "folder":
        bad_file.mkdir()
    batches = listing(tmp_path, bad_file)
    with largest_file({"full": 0, "half a line": 30}.get(fault, 1 << 30)):
        seen = list(batches.epoch(0))
    assert same(seen, list(listing(tmp_path, None).epoch(0)))
    assert sorted(batches.bad) == BOTH
    said = capsys.readouterr().err
    assert said.count("the run goes on") == 1
    assert str(bad_file) in said
    if fault in ("full", "half a line"):
        assert bad_file.read_bytes() == b""
    if fault == "link":
        assert (tmp_path / "mine").read_text() == "mine"
        bad_file.unlink()
    if fault == "folder":
        bad_file.rmdir()
    bad_file.parent.mkdir(exist_ok=True)
    list(batches.epoch(1))
    assert sorted(names_in(bad_file)) == BOTH
    assert "the run goes on" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe\n", b"{}\n", b"[" * 100_000 + b"\n"]
    + [pytest.param(line, marks=pytest.mark.slow) for line in (b"[1]\n", b"null\n", b"words\n", b"\n")],
    ids=range(7),
)
def test_damaged_lines_in_the_list_of_bad_images_are_left_and_said(line, tmp_path, capsys):
    bad_file = tmp_path / "bad.jsonl"
    held = line + b'{"name": "class2/0017.png", "reason": "x"}'  # whole, though its line end is missing
    bad_file.write_bytes(held)
    list(listing(tmp_path, bad_file).epoch(0))
    content = bad_file.read_bytes()
    assert content == held + b'\n{"name": "class1/0130.png", "reason": "the file is empty"}\n'
    assert capsys.readouterr().err.count("1 of them: they are left as they are") == 1


def test_bad_files_on_disk_are_found_named_and_replaced(tmp_path):
    fill(tmp_path, {"train/a": 40, "train/b": 40, "val/a": 2, "val/b": 2})
    (tmp_path / "train" / "b" / "7.png").write_bytes(PNG[:100])
    (tmp_path / "val" / "a" / "1.png").write_bytes(b"<html>")
    found = data.folder(tmp_path)
    batches = Batches(found.train, COLOUR, batch_images=16, training=True, augment="imagenet", randaugment_ops=1,
                      randaugment_magnitude=9)  # fmt: skip
    assert [batch.images.shape for batch in batches.epoch(0)] == [(16, 3, 8, 8)] * 5
    assert list(batches.bad) == ["train/b/7.png"]
    with pytest.raises(BadImage, match=r"^val/a/1\.png: is no JPEG"):
        list(Batches(found.val, COLOUR, batch_images=2, training=False).epoch(0))


def test_workers_end_with_the_batches():
    before = set(multiprocessing.active_children())
    batches = Batches(numbered(20), GREY, batch_images=5, training=True, workers=2)
    next(batches.epoch(0))
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    del batches
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_signal_to_every_process_leaves_the_readers_to_the_run():
    """torchrun passes SIGTERM to the whole group: readers that died of it would fail the step that is to be saved."""
    before = set(multiprocessing.active_children())
    batches = Batches(numbered(20), GREY, batch_images=5, training=True, workers=2)
    want = [batch.ids for batch in batches.epoch(0)]
    workers = set(multiprocessing.active_children()) - before
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)  # not their parent
    time.sleep(0.2)
    assert [batch.ids for batch in batches.epoch(0)] == want
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()  # their parent
        worker.join(5)
        assert worker.exitcode == 0


def test_an_epoch_of_digits_takes_well_under_a_second():
    train, _ = data.digits()
    view = replace(GREY, image_px=16)
    batches = Batches(train, view, batch_images=64, training=True, augment="digits")
    next(batches.epoch(0))
    start = time.process_time()  # of this process alone: a busy neighbour does not count
    assert sum(len(batch.ids) for batch in batches.epoch(1)) == 1408
    assert time.process_time() - start < 1  # 0.17 s on a quiet core


@dataclass(frozen=True, eq=False)
class Slow(Images):
    """A picture takes a while, as it does from a disk; the process that reads it leaves word of itself."""

    place: Path

    def load(self, index: int) -> Image.Image:
        (self.place / str(os.getpid())).touch()
        time.sleep(0.01)
        return Image.new("L", (8, 8))


def _reads_large_batches(place):
    plain = numbered(20_000)
    images = Slow(plain.classes, plain.names, plain.labels, place)
    next(Batches(images, GREY, batch_images=4096, training=True, workers=3).epoch(0))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_read_are_gone_soon_after_their_run_however_large_the_batch(number, tmp_path, children):
    run = children.start(_reads_large_batches, tmp_path)  # a batch takes 40 s
    readers = tmp_path.glob
    until(lambda: len(list(readers("[0-9]*"))) == 3)
    pids = [path.name for path in readers("[0-9]*")]
    os.kill(run.pid, number)
    until(lambda: not any(map(runs, pids)), timeout_s=10)
