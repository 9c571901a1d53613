"""A column of paths of image files, read as pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from weingarten.applications.clean.errors import UserError
from weingarten.applications.clean.reader import Reader

__all__ = ["Images"]

LARGEST = 64
"""Rows and columns of pixels at most: each pixel is a feature, and a network without convolutions has no use for more."""
GREYS, COLOURS = (
    ("1", "L", "LA", "La"),
    ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
)


class Images(Reader):
    """The pixels of each image, 0 to 255, row by row.

    Args:
        height: of all images, in pixels; others are resized to it.
        width: likewise.
        colour: red, green and blue of each pixel, or else its grey.
    """

    one_unit = True

    def __init__(self, height: int, width: int, colour: bool) -> None:
        self.height, self.width, self.colour = height, width, colour
        self._known: dict[str, np.ndarray] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    @staticmethod
    def fit(column: pd.Series, file: str) -> Images:
        """A reader for the images of a column.

        Its pixels are greys if all images are grey. Its height is the smallest height among them and its width the smallest
        width, ``LARGEST`` at most.

        Raises:
            UserError: if a file cannot be opened, or holds no image.
        """
        sizes, colour = [], False
        for row, value in enumerate(column.tolist()):
            with _opened(value, f"row {row} of {file}") as image:
                width, height = _upright(image)
                sizes.append((height, width))
                colour |= image.mode in COLOURS
        height, width = np.min(sizes, axis=0).tolist()
        return Images(min(height, LARGEST), min(width, LARGEST), colour)

    def inspect(self, column: pd.Series, file: str) -> list[str]:
        values = column.tolist()
        for row, value in enumerate(values):
            if value not in self._known:
                self._known[value] = self._pixels(value, f"row {row} of {file}")
        tone = "in colour" if self.colour else "in grey"
        size = f"{self.height} rows of {self.width} pixels"
        notes = [f"Column {column.name} holds images. Their pixels are features: {size}, {tone}."]
        resized = sum(self._sizes[value] != (self.height, self.width) for value in values)
        if resized:
            notes.append(
                f"{resized} of {len(values)} images of {file} had another size and were resized to {size}."
            )
        return notes

    def prepare(self, cache: Path, progress: Callable[[float, str], None]) -> None:
        pass  # all has been read: a file that cannot be should be found out before anything is written

    def read(self, column: pd.Series) -> np.ndarray:
        flat = [self._find(value, f"row {row}").reshape(-1) for row, value in enumerate(column.tolist())]
        size = self.height * self.width * (3 if self.colour else 1)
        return np.stack(flat) if flat else np.zeros((0, size), dtype=np.uint8)

    def picture(self, value: str) -> np.ndarray | None:
        return self._find(value, "the report")

    def digest(self) -> str:
        found = hashlib.sha256(repr(self.to_json()).encode())
        for name in sorted(self._known):
            found.update(hashlib.sha256(self._known[name].tobytes()).digest())
        return found.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "images", "height": self.height, "width": self.width, "colour": self.colour}

    def _find(self, value: str, place: str) -> np.ndarray:
        return self._known[value] if value in self._known else self._pixels(value, place)

    def _pixels(self, value: str, place: str) -> np.ndarray:
        """(H, W) or (H, W, 3), uint8. What is transparent becomes white."""
        with _opened(value, place) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        self._sizes[value] = (image.height, image.width)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        image = image.convert("RGB" if self.colour else "L")
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BOX)
        return np.asarray(image)


@contextmanager
def _opened(value: str, place: str) -> Iterator[Image.Image]:
    """The image of a file; errors while it is opened or read within the block become the user's."""
    try:
        with Image.open(value) as image:
            if image.mode not in GREYS + COLOURS:
                raise UserError(
                    f"--images: {place}: {value} has pixels of mode {image.mode}, expected 8 bits of grey or colour; convert it"
                )
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"--images: {place}: no such image: {value}; paths are relative to the table's folder, or absolute"
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(repr(value), "").strip()[:100] or type(error).__name__
        raise UserError(
            f"--images: {place}: {value} is no readable image ({reason}); replace it, or remove the row"
        ) from error


def _upright(image: Image.Image) -> tuple[int, int]:
    """Width and height once a photograph has been turned as its camera was held."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size
