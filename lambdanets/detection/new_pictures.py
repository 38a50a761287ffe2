"""Pictures written into a folder, none over another."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from PIL import Image

from lambdanets.errors import BadRun


class NewPictures:
    """A folder that pictures are written into. Raises BadRun where it cannot be made."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._next: dict[str, int] = {}
        try:
            os.makedirs(self.folder, exist_ok=True)
        except (OSError, ValueError) as error:
            raise BadRun(f"{folder} cannot be made ({error}): name another folder to draw to") from error

    def save(self, picture: Image.Image, source: str | Path) -> Path:
        """Write a picture under the file name of the one that it was drawn on, or with -2, -3 ... where there is one.

        A JPEG where that is one by its suffix, else a PNG. Gives its path. Raises BadRun.
        """
        stem, suffix = os.path.splitext(os.path.basename(source))
        name, form = (f"{stem}{suffix}", "JPEG") if suffix.lower() in (".jpg", ".jpeg") else (f"{stem}.png", "PNG")
        stem, suffix = os.path.splitext(name)
        number = self._next.get(name, 1)
        while True:
            path = self.folder / (name if number == 1 else f"{stem}-{number}{suffix}")
            number += 1
            with contextlib.suppress(FileExistsError):
                _write(picture, path, form)
                self._next[name] = number
                return path


def _write(picture: Image.Image, path: Path, form: str) -> None:
    """Raises FileExistsError, BadRun."""
    how = {"quality": 90} if form == "JPEG" else {"compress_level": 3}
    try:
        with open(path, "xb") as file:
            try:
                picture.save(file, form, **how)
            except BaseException:
                os.unlink(path)
                raise
    except FileExistsError:
        raise
    except OSError as error:
        raise BadRun(f"{path} cannot be written: {error}") from error
