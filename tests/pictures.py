"""Pictures of every kind that people bring, made here: formats, modes, orientations, profiles. All are deterministic."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from tests.tars import image_bytes

WIDTH, HEIGHT = 40, 24
ORIENTATION = 0x0112
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}</rdf:RDF></x:xmpmeta>'
)
XMP_FORMS = ('tiff:Orientation="{}"/>', "><tiff:Orientation>{}</tiff:Orientation></rdf:Description>")


def scene(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """RGB without any symmetry, so that each way to turn it gives other pixels."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x * 7 + y * 13) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def alpha() -> Image.Image:
    """From transparent to opaque, left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))


def values(dtype: Any, largest: float) -> np.ndarray:
    """0 to `largest` over the picture."""
    ramp = np.linspace(0.0, largest, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    return ramp.astype(dtype) if np.issubdtype(dtype, np.floating) else np.rint(ramp).astype(dtype)


def deep(dtype: Any, largest: float, kind: str = "TIFF") -> bytes:
    return image_bytes(Image.fromarray(values(dtype, largest)), kind)


def with_alpha(mode: str, kind: str) -> bytes:
    image = scene().convert("RGBA")
    image.putalpha(alpha())
    return image_bytes(image.convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))


def turned(kind: str, orientation: int, source: str) -> bytes:
    """The scene stored as a camera that is held so stores it, with its orientation said by `source`."""
    options: dict[str, Any] = {}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    xmp = XMP.format(XMP_FORMS[orientation % 2].format(orientation)).encode()
    match source, kind:
        case "exif", "TIFF":
            options = {"tiffinfo": _ifd({ORIENTATION: orientation})}
        case "exif", _:
            options = {"exif": exif}
        case "xmp", "TIFF":
            options = {"tiffinfo": _ifd({700: xmp})}
        case "xmp", "PNG":
            info = PngInfo()
            info.add_itxt("XML:com.adobe.xmp", xmp.decode())
            options = {"pnginfo": info}
        case "xmp", _:
            options = {"xmp": xmp}
        case "both", "TIFF":
            options = {"tiffinfo": _ifd({ORIENTATION: orientation, 700: xmp})}
        case "both", _:
            options = {"exif": exif, "xmp": xmp}
    options |= {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    return image_bytes(scene(), kind, **options)


def exif_behind_the_pixels(orientation: int) -> bytes:
    """A PNG whose eXIf chunk comes last, as some editors write it."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return add_chunk(image_bytes(scene()), b"eXIf", exif.tobytes()[6:], before=b"IEND")


def add_chunk(png: bytes, kind: bytes, data: bytes, *, before: bytes = b"IDAT") -> bytes:
    place = png.index(before) - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:place] + chunk + png[place:]


def png(depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any depth, its samples [H, bytes of a row] as they are in the file."""
    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3}[colour])
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")):
        file += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return file


def animated(kind: str) -> bytes:
    frames = [scene(), Image.new("RGB", (WIDTH, HEIGHT), "green")]
    return image_bytes(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def _ifd(tags: dict[int, Any]) -> TiffImagePlugin.ImageFileDirectory_v2:
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        ifd[tag] = value
        if isinstance(value, bytes):
            ifd.tagtype[tag] = 1
    return ifd


def usual() -> Iterator[tuple[str, bytes]]:
    """Every mode that each format holds."""
    modes = {
        "PNG": ("1", "L", "P", "RGB", "I;16"),
        "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
        "WEBP": ("RGB",),
        "BMP": ("1", "L", "P", "RGB"),
        "GIF": ("1", "L", "P"),
        "TIFF": ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"),
    }
    for kind, mode in ((kind, mode) for kind, names in modes.items() for mode in names):
        yield f"{kind} {mode}", image_bytes(_as(mode), kind)


def _as(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(values(np.uint16, 65535))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(scene(), *profiles, outputMode="LAB")
        assert image is not None
        return image
    return scene().convert(mode)


def unusual() -> Iterator[tuple[str, bytes]]:
    """What a decoder can read in more than one way."""
    for kind, mode in (("PNG", "LA"), ("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("TIFF", "LA")):
        yield f"{kind} {mode}", with_alpha(mode, kind)
    yield "BMP with alpha", _bmp_with_alpha()
    palette = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    yield "PNG palette, a colour transparent", image_bytes(palette, transparency=palette.getpixel((0, 0)))
    yield "PNG palette, alphas", image_bytes(palette, transparency=bytes(range(0, 256, 4)))
    yield "GIF, a colour transparent", image_bytes(palette, "GIF", transparency=palette.getpixel((0, 0)))
    grey = scene().convert("L")
    yield "PNG L, a grey transparent", image_bytes(grey, transparency=grey.getpixel((3, 3)))
    yield "PNG RGB, a colour transparent", image_bytes(scene(), transparency=scene().getpixel((3, 3)))
    sixteen = Image.fromarray(values(np.uint16, 65535))
    yield "PNG I;16, a grey transparent", image_bytes(sixteen, transparency=int(np.asarray(sixteen)[3, 3]))
    for dtype in ("<u2", ">u2", np.uint16):
        yield f"TIFF 16 bits {np.dtype(dtype).str}", deep(dtype, 65535)
    yield "TIFF 32 bits", deep(np.int32, 255)
    yield "TIFF floats", deep(np.float32, 1.0)
    for kind in ("GIF", "PNG", "WEBP"):
        yield f"animated {kind}", animated(kind)
    stream = io.BytesIO()
    scene().save(stream, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    yield "MPO", stream.getvalue()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        yield f"{kind} with a profile", image_bytes(scene(), kind, icc_profile=profile)
    yield "PNG with gamma", add_chunk(image_bytes(scene()), b"gAMA", struct.pack(">I", 100000))
    yield "progressive JPEG", image_bytes(scene(), "JPEG", progressive=True, quality=80)
    yield "JPEG with little colour", image_bytes(scene(), "JPEG", subsampling="4:2:0", quality=40)


def _bmp_with_alpha() -> bytes:
    """32 bits with an alpha mask, which Pillow reads and does not write."""
    image = scene().convert("RGBA")
    image.putalpha(alpha())
    masks = struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes()
    info = struct.pack("<IiiHHIIiiII", 108, WIDTH, HEIGHT, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    info += masks + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(pixels), 0, 0, 14 + len(info)) + info + pixels


def turns() -> Iterator[tuple[str, bytes]]:
    """Every orientation in every place that can say it."""
    places = itertools.product(("JPEG", "PNG", "WEBP", "TIFF"), ("exif", "xmp", "both"), range(1, 9))
    for kind, source, orientation in places:
        if (kind, source) != ("PNG", "both"):
            yield f"{kind} turned {orientation} by {source}", turned(kind, orientation, source)
    for orientation in (3, 6):
        yield f"PNG turned {orientation} behind its pixels", exif_behind_the_pixels(orientation)


ALL = dict(itertools.chain(usual(), unusual(), turns()))
