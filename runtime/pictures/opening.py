"""Picture files of other people, opened within bounds: no program starts, and neither memory nor time runs away.

The formats are named: of its own accord Pillow hands a PostScript file to Ghostscript, whatever it is called.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from calotype.runtime.errors import CalotypeError, InputError, quoted
from calotype.runtime.pictures.bounds import MAX_PIXELS, check_segments, check_size, check_work
from calotype.runtime.untrusted import read_bytes, why

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")
READ = "PNG, JPEG, WebP, AVIF, TIFF, BMP and GIF are read"
MAX_BYTES = 2**28
MAX_READS = 2**21  # a decoder's calls of read(): some take a few bytes each, in Python


class Metered(io.BytesIO):
    """A file in memory that is given out a bounded number of times, and as many times its size."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads, self._left = MAX_READS, 4 * len(data) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        """See :meth:`io.BytesIO.read`; raises OSError where a decoder goes round and round."""
        data = super().read(size)
        self._reads -= 1
        self._left -= len(data)
        if min(self._reads, self._left) < 0:
            raise OSError("it is made of more pieces than a picture has")
        return data


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file, its pixels not yet decoded; whatever goes wrong with it in the block is an InputError.

    Raises:
        InputError: there is none, it is no picture, or it is larger than ``MAX_PIXELS`` and ``MAX_BYTES`` allow.
    """
    with opened_data(read_bounded(path), str(path)) as image:
        yield image


@contextlib.contextmanager
def opened_data(data: bytes, name: str) -> Iterator[Image.Image]:
    """The same of a file's content, which errors call by ``name``."""
    with reading(name):
        image = open_data(data, name)
        check_size(image, name)
        check_work(image, data, name)
        yield image


def open_data(data: bytes, name: str) -> Image.Image:
    """A picture of which nothing but its head was read; of any size."""
    check_segments(data, name)
    return Image.open(Metered(data), formats=FORMATS)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Make an InputError of whatever decoders raise: for damaged data that is no closed set."""
    too_large = f"{name} has more than {MAX_PIXELS} pixels; scale it down first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that is survived, and of sizes that are errors here
            yield
    except (CalotypeError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise InputError(too_large) from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read; {READ}") from None
    except Exception as error:
        raise InputError(f"{name} is not a picture that can be read: {error}") from error


def read_bounded(path: Path) -> bytes:
    """The bytes of a file that is one: not a folder, a pipe or a device; raises InputError."""
    try:
        return read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # the latter of a name with a null character
        raise InputError(f"{quoted(str(path))} is not a picture that can be read: {why(error)}") from error
