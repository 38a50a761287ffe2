"""A file to an upright RGB picture, or what is wrong: with the picture, the data set, or the disk."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lambdanets.errors import BadImage, DiskFault
from lambdanets.files import tried_again

MAX_IMAGE_PX = 50_000_000


"""Width times height above which a picture is refused by its header, undecoded."""


_PNG_HEAD, _JPEG_HEAD = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_MOST_TURN_BYTES, _MOST_SLIM_BYTES = 1 << 20, 1 << 29
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


# EXIF tag 0x0112 -> what turns the stored picture upright.  ImageOps.exif_transpose rewrites all tags besides, and
# fails where one of the others is broken.
_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_PNG_TURN_KEYS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


class _TooLarge(BadImage):
    """By its header: nothing else of the file need be looked at."""


def open_image(
    source: str | Path | bytes, *, name: str | None = None, max_px: int = MAX_IMAGE_PX, known: bool = True
) -> Image.Image:
    """Decodes one picture to 8-bit RGB, upright, whatever its file is called.

    source  a path, or the bytes of a file: JPEG, PNG, WebP, GIF or BMP, recognised by content
    name    what errors call it (default: the path)
    max_px  largest width x height; read from the header, nothing is decoded above it
    known   the file was seen there before: a fault of the disk, a missing file too, is tried again for two seconds

    Of an animation the first frame; transparency is composited on white; 16-bit grey is scaled, not clipped; CMYK is
    converted as Pillow does; the EXIF orientation is applied; colour profiles are not. Other metadata plays no part,
    large or broken.
    Raises BadImage with a plain reason for content that is no such picture: empty, cut off, another format, too large;
    DiskFault where the file cannot be read, which says nothing of its content: missing, forbidden, a fault of the disk.

    >>> file = io.BytesIO()
    >>> Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(file, "PNG")
    >>> open_image(file.getvalue()).getpixel((0, 0))
    (255, 255, 255)
    """
    shown = name if name is not None else "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        if not known:
            return _opened(source, shown, max_px)
        return tried_again(lambda: _opened(source, shown, max_px))
    except OSError as error:
        raise DiskFault(shown, f"cannot be read: {error.strerror}") from error


def _opened(source: str | Path | bytes, name: str, max_px: int) -> Image.Image:
    """The picture. Raises BadImage for its content, OSError with the system's number for the disk."""
    with warnings.catch_warnings(), _file(source, name) as file:
        warnings.simplefilter("ignore")  # Pillow's bomb and metadata warnings: decided here, by max_px
        found = _decoded(file, name, max_px)
        for keep_turn in (True, False):
            if isinstance(found, BadImage) and not isinstance(found, _TooLarge):
                slim = _without_metadata(file, keep_turn=keep_turn)
                again = found if slim is None else _decoded(slim, name, max_px)
                found = found if isinstance(again, BadImage) else again
    if isinstance(found, BadImage):
        raise BadImage(*found.args)
    return found


def _decoded(file: io.BufferedIOBase, name: str, max_px: int) -> Image.Image | BadImage:
    """The picture, or what is wrong with it. Raises OSError with the system's number for the disk."""
    try:
        return _decode(file, name, max_px)
    except BadImage as error:
        return error
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except OSError as error:
        if error.errno is not None:  # the system's; Pillow's own have no number
            raise
        return BadImage(name, f"is broken or cut off: {error}")
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError ... on broken files
        return BadImage(name, f"is broken: {type(error).__name__}: {error}")


def _file(source: str | Path | bytes, name: str) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    reason = "is a folder or a device, not a file"
    try:
        opened = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise BadImage(name, reason) from None
        raise
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise BadImage(name, reason)
    return os.fdopen(opened, "rb")


def _decode(file: io.BufferedIOBase, name: str, max_px: int) -> Image.Image:
    file.seek(0)
    head = file.read(16)
    if not head:
        raise BadImage(name, "the file is empty")
    file.seek(0)
    try:
        image = Image.open(file, formats=_FORMATS)  # type: ignore[arg-type]  # reads the header only
    except UnidentifiedImageError:
        reason = f"is no JPEG, PNG, WebP, GIF or BMP image, or is cut off in its header: it begins with {head!r}"
        raise BadImage(name, reason) from None
    except Image.DecompressionBombError as error:
        raise _TooLarge(name, f"is too large to decode (max_px is {max_px:,}): {error}") from None
    width, height = image.size
    if width * height > max_px:
        raise _TooLarge(name, f"has {width} x {height} = {width * height:,} pixels, more than max_px = {max_px:,}")
    image.load()
    try:
        turn = _ORIENTATION.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata around a good picture: shown as stored
        turn = None
    rgb = _to_rgb(image)
    rgb.info.clear()  # else a later reader of the EXIF tag turns it again
    return rgb if turn is None else rgb.transpose(turn)


def _without_metadata(file: io.BufferedIOBase, *, keep_turn: bool) -> io.BytesIO | None:
    """A PNG or JPEG again with the parts alone that decide its pixels, and those that may say which side is up.

    For a picture at which Pillow stumbled: it may have been at the metadata, over its own limits or over damage. What
    is left out is passed over unread. None: nothing can be left out, or it is no such file, or too large.
    """
    file.seek(0)
    head = file.read(8)
    parts = _png_parts if head == _PNG_HEAD else _jpeg_parts if head[:2] == _JPEG_HEAD else None
    if parts is None:
        return None
    slim, left_out = io.BytesIO(), False
    for part in parts(file, keep_turn):
        left_out = left_out or part is None
        if slim.write(part or b"") and slim.tell() > _MOST_SLIM_BYTES:
            return None
    slim.seek(0)
    return slim if left_out else None


def _png_parts(file: io.BufferedIOBase, keep_turn: bool) -> Iterator[bytes | None]:
    """The chunks of a PNG that matter, as they are; None for each that does not."""
    file.seek(len(_PNG_HEAD))
    yield _PNG_HEAD
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        decides = not kind[0] & 32 or kind == b"tRNS"  # without the bit 32 a chunk is critical
        if not decides and keep_turn and length <= _MOST_TURN_BYTES:
            body = file.read(length + 4)
            yield head + body if kind == b"eXIf" or body.startswith(_PNG_TURN_KEYS) else None
        elif not decides:
            file.seek(length + 4, os.SEEK_CUR)
            yield None
        else:
            yield head + file.read(min(length + 4, _MOST_SLIM_BYTES))


def _jpeg_parts(file: io.BufferedIOBase, keep_turn: bool) -> Iterator[bytes | None]:
    """The segments of a JPEG that matter, as they are; None for each that does not."""
    file.seek(len(_JPEG_HEAD))
    yield _JPEG_HEAD
    while len(head := file.read(4)) == 4 and head[0] == 0xFF and head[1] not in (0xFF, 0xDA):  # to the first scan
        (length,) = struct.unpack(">H", head[2:])
        body = file.read(max(0, length - 2))
        is_metadata = 0xE0 <= head[1] <= 0xEF or head[1] == 0xFE  # APP0 to APP15, a comment
        turns = head[1] in (0xE0, 0xE1) and body.startswith((b"JFIF", b"Exif", b"http://ns.adobe.com/xap/"))
        adobe = head[1] == 0xEE  # says what the colours mean
        yield head + body if not is_metadata or adobe or (keep_turn and turns) else None
    yield head + file.read(_MOST_SLIM_BYTES)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, where convert("RGB") clips
        return image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
