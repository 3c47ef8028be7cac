"""What an encoded image looks like: the one decoder of this project, and the bytes that show others the same picture.

A picture is what `decode_image` makes of the bytes: the first frame, upright, opaque, RGB of 8 bits.

    upright     turned as its orientation says, once, whether EXIF or XMP holds it
    opaque      whatever is transparent lies on white
    8 bits      integers of 9 to 16 bits are scaled by the largest that their bits can hold, as in viewers
                32-bit integers are 0 to 255 already, floats are 0 to 1

The last line is a convention, which not every file follows: 32-bit integers above 255, and floats above 1 or below 0,
may be depths, counts or another scale. They are refused rather than guessed, and so is what has no known way to RGB.
Values of 12 bits in a file that says 16 look dark: nothing in it says so. Colour profiles and gamma are ignored, as by
the image processors that models were trained with.

Servers are sent `as_png`, which leaves their decoder no choice: SGLang, left alone with the bytes, turns nothing,
drops transparency instead of putting it on white, cuts 16 bits off at 255, and decodes JPEG on the GPU, with other
pixels than libjpeg's. Judges and pages, where a level of brightness more or less does not matter, get `shown`, which
keeps photos small.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gspo_mm.data.faults import BadSample

# what Pillow may take an image for, whatever its suffix: other formats start programs (EPS) or are not of pictures
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000  # larger images are refused by their header, before any memory is taken

_ORIENTATION = 0x0112  # of EXIF, and of TIFF
_BITS_PER_SAMPLE = 0x0102  # of TIFF
# without one of these words a PNG has no orientation, neither in front of its pixels nor behind them
_PNG_MAY_TURN = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")
# chunks of a PNG that no decoder makes anything of but the pixels
_PNG_SILENT = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"sRGB", b"tIME"}


def measure(data: bytes) -> tuple[int, int]:
    """Width and height that `decode_image` will give, from the header wherever that is enough. Raises BadSample.

    Pixels are looked at only where their values decide whether the image can be shown.
    """
    with _opened(data) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadSample("image too large", f"{width}x{height} pixels, more than {MAX_PIXELS}")
        turned = _orientation(image, data) in (5, 6, 7, 8)  # axes swapped
        if image.mode in ("I", "F"):
            decode_image(data)
        # Pillow gives the upright size of a TIFF whose own tag turns it
        return (height, width) if turned and _ORIENTATION not in _tags(image) else (width, height)


def decode_image(data: bytes) -> Image.Image:
    """The picture, as said at the top of this file, without any metadata. Raises BadSample."""
    with _opened(data) as opened:
        tags = dict(_tags(opened))
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if opened.format == "PNG" and image.mode != "P" and "transparency" in image.info:
            image.info["transparency"] = _of_pixels(image.info["transparency"], image.mode, bits=data[24])
        if image.mode.startswith("I;16"):
            image = _of_16_bits(image, bits=tags.get(_BITS_PER_SAMPLE, (16,))[0])
        elif image.mode in ("I", "F"):
            image = _of_32_bits(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    image.info.clear()
    return image


def as_png(data: bytes) -> bytes:
    """A PNG of the picture: the bytes as they came where these plainly are one, else made again. Raises BadSample."""
    return data if _is_plain_png(data) else png_of(decode_image(data))


@lru_cache(maxsize=8)  # the answers of a group are judged one by one
def shown(data: bytes) -> tuple[str, bytes]:
    """MIME type and bytes of the picture for a viewer: as they came where any shows them so, else `as_png`."""
    with _opened(data) as image:
        kind = _format(image)
        plain = kind in ("PNG", "JPEG", "WEBP") and image.mode in ("RGB", "L")
        if plain and not image.has_transparency_data and _orientation(image, data) == 1:
            return Image.MIME[kind], data
    return "image/png", as_png(data)


def data_url(data: bytes, *, lossless: bool = False) -> str:
    """A URL that holds the picture: as `shown`, or as `as_png`, which leaves no decoder a choice."""
    kind, encoded = ("image/png", as_png(data)) if lossless else shown(data)
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # a third of the default's time for a sixth more bytes
    return buffer.getvalue()


def thumbnail(data: bytes, side: int) -> bytes:
    """A PNG of the picture, made smaller until neither side is longer than `side`. Raises BadSample."""
    image = decode_image(data)
    image.thumbnail((side, side))
    return png_of(image)


def kind_of(data: bytes) -> tuple[str, ...]:
    """Format and mode by Pillow's names, then what they do not say of how it must be shown. Raises BadSample."""
    with _opened(data) as image:
        turned = _orientation(image, data)
        notes = [f"orientation {turned}"] * (turned != 1) + ["transparency"] * ("transparency" in image.info)
        return _format(image), image.mode, *notes


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The image, with its header read; whatever goes wrong with it in the block becomes a BadSample."""
    if not data:
        raise BadSample("corrupt image", "it is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("image too large", str(error)) from None
    except UnidentifiedImageError:
        raise BadSample("corrupt image", f"its header is of none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise whatever their format's library does
        raise BadSample("corrupt image", str(error) or type(error).__name__) from None


def _format(image: Any) -> str:
    """Phones put a second picture behind a JPEG, which makes it an MPO to Pillow and to nobody else."""
    return image.format.replace("MPO", "JPEG")


def _orientation(image: Any, data: bytes) -> Any:
    """As in EXIF, 1 to 8, or what stands in its place; 1 where nothing is said."""
    # for a PNG without EXIF in its header, getexif decodes the whole image to look for one behind the pixels
    if image.format == "PNG" and not any(word in data for word in _PNG_MAY_TURN):
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _tags(image: Any) -> Any:
    """The tags of a TIFF; other formats have none."""
    return getattr(image, "tag_v2", {})


def _of_16_bits(image: Image.Image, *, bits: int) -> Image.Image:
    values, key = np.asarray(image).astype(np.uint32), image.info.get("transparency")
    largest = 2**bits - 1
    grey = Image.fromarray(((values * 255 + largest // 2) // largest).clip(0, 255).astype(np.uint8))
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _of_32_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    largest, what = (255.0, "signed or 32-bit integers") if image.mode == "I" else (1.0, "floats")
    low, high = values.min(), values.max()
    if not 0.0 <= low <= high <= largest:
        raise BadSample(
            "image refused",
            f"its {what} run from {low:g} to {high:g}, and only 0 to {largest:g} can be shown; convert it to 8 bits",
        )
    return Image.fromarray(np.rint(values * (255.0 / largest)).astype(np.uint8))


def _of_pixels(key: Any, mode: str, *, bits: int) -> Any:
    """The transparent colour of a PNG in the values of Pillow's pixels: it is given in those of the file."""
    if mode == "L" and bits < 8:
        return key * 255 // (2**bits - 1)
    return tuple(value >> 8 for value in key) if mode == "RGB" and bits == 16 else key


def _is_plain_png(data: bytes) -> bool:
    """Whole, RGB of 8 bits, with nothing that could turn it, make it transparent or change its colours."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or data[24:26] != b"\x08\x02":
        return False
    place, kind = 8, b""
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind not in _PNG_SILENT:
            return False
        place += 12 + length
    return kind == b"IEND" and place == len(data)
