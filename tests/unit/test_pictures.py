"""One picture for all who look: what it is, how large, and that SGLang's own loader reads what is sent as just that."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import as_png, decode_image, measure, shown
from tests import pictures
from tests.pictures import ALL, add_chunk, alpha, deep, scene, turned, values
from tests.tars import image_bytes

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data)).astype(int)


@pytest.mark.parametrize("name", ALL)
def test_the_header_tells_the_size_of_what_is_decoded(name: str) -> None:
    assert measure(ALL[name]) == decode_image(ALL[name]).size


@pytest.mark.parametrize("name", ALL)
def test_what_is_sent_is_a_png_of_the_picture_and_of_nothing_else(name: str) -> None:
    with Image.open(io.BytesIO(as_png(ALL[name]))) as sent:
        assert (sent.format, sent.mode, sent.getexif().get(pictures.ORIENTATION)) == ("PNG", "RGB", None)
        assert "transparency" not in sent.info
        assert np.array_equal(np.asarray(sent), pixels(ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_what_a_viewer_is_sent_needs_no_turning_and_no_background(name: str) -> None:
    kind, data = shown(ALL[name])
    with Image.open(io.BytesIO(data)) as sent:
        assert Image.MIME[sent.format or ""].replace("mpo", "jpeg") == kind
        assert sent.mode in ("RGB", "L")
        assert not sent.has_transparency_data
        assert np.array_equal(np.asarray(sent.convert("RGB")), pixels(ALL[name]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("source", ["exif", "xmp", "both"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_once_whatever_says_so(kind: str, source: str, orientation: int) -> None:
    if (kind, source) == ("PNG", "both"):
        data = add_chunk(turned("PNG", orientation, "exif"), b"tEXt", b"Raw profile type xmp\0x")
    else:
        data = turned(kind, orientation, source)
    method = TURNS[orientation]
    upright = scene() if method is None else scene().transpose(method)
    difference = np.abs(pixels(data) - np.asarray(upright).astype(int)).mean()
    assert difference < (6 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_orientation_behind_the_pixels_counts(orientation: int) -> None:
    data = pictures.exif_behind_the_pixels(orientation)
    method = TURNS[orientation]
    assert method is not None
    assert np.array_equal(pixels(data), np.asarray(scene().transpose(method)))


@pytest.mark.parametrize(
    "data",
    [
        deep(np.uint16, 65535),
        deep(">u2", 65535),
        deep(np.uint16, 65535, "PNG"),
        deep(np.int32, 255),
        deep(np.float32, 1.0),
    ],
    ids=["TIFF", "TIFF big-endian", "PNG", "32 bits", "floats"],
)
def test_deep_values_are_scaled_to_all_of_eight_bits(data: bytes) -> None:
    expected = np.rint(values(np.float64, 255.0))
    assert np.abs(pixels(data)[..., 0] - expected).max() <= 1
    assert (pixels(data).min(), pixels(data).max()) == (0, 255)


def test_twelve_bits_are_scaled_by_twelve_bits() -> None:
    """Two values in three bytes, as scanners write them."""
    image = Image.new("L", (4, 1))
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    samples = [0x000, 0x555, 0xAAA, 0xFFF]
    packed = b"".join(
        struct.pack(">I", a << 12 | b)[1:] for a, b in zip(samples[::2], samples[1::2], strict=True)
    )
    tags = [(256, 3, 1, 4), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(packed))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory
    assert pixels(data)[0, :, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize(
    ("dtype", "largest", "said"),
    [
        (np.int32, 65535, "integers run from 0 to 65535, and only 0 to 255"),
        (np.float32, 255.0, "floats run from 0 to 255, and only 0 to 1"),
        (np.float32, -1.0, "floats run from -1 to 0"),
        (np.float32, np.nan, "floats run from nan"),
    ],
)
def test_values_of_an_unknown_scale_are_refused_with_their_range(
    dtype: type, largest: float, said: str
) -> None:
    with pytest.raises(BadSample, match=f"image refused: .*{said}.*convert it to 8 bits"):
        decode_image(deep(dtype, largest))


def on_white(colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return 255 + (colour.astype(float) - 255) * (opacity[..., None] / 255.0)


@pytest.mark.parametrize("name", ["PNG RGBA", "WEBP RGBA", "TIFF RGBA", "BMP with alpha"])
def test_half_transparent_pixels_lie_on_white(name: str) -> None:
    found, expected = pixels(ALL[name]), on_white(np.asarray(scene()), np.asarray(alpha()))
    seen = np.asarray(alpha()) > 8  # encoders may change what is hardly there
    assert np.abs(found - expected)[seen].max() <= 2
    assert found[:, 0].min() == 255


def key_of(*samples: int) -> tuple[bytes, bytes]:
    return b"tRNS", struct.pack(f">{len(samples)}H", *samples)


TWO_BITS = np.array([[0b00011011]], dtype=np.uint8)
FOUR_BITS = np.array([[0x0F, 0x5A]], dtype=np.uint8)
GREYS = np.array([[0, 300, 65535]], dtype=">u2")
COLOURS = np.array([[[0, 0, 0], [51400, 700, 2570]]], dtype=">u2").reshape(1, 6)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (pictures.png(2, 0, TWO_BITS, key_of(1)), [0, 255, 170, 255]),
        (pictures.png(4, 0, FOUR_BITS, key_of(0)), [255, 255, 85, 170]),
        (pictures.png(8, 0, np.array([[5, 9]], dtype=np.uint8), key_of(5)), [255, 9]),
        (pictures.png(16, 0, GREYS.view(np.uint8), key_of(300)), [0, 255, 255]),
        (pictures.png(16, 2, COLOURS.view(np.uint8), key_of(51400, 700, 2570)), [0, 255]),
        (pictures.png(16, 2, COLOURS.view(np.uint8), key_of(0, 0, 0)), [255, 200]),
    ],
    ids=["2 bits", "4 bits", "8 bits", "16 bits", "16 bits RGB", "16 bits RGB black"],
)
def test_a_transparent_colour_is_meant_in_the_values_of_the_file(data: bytes, expected: list[int]) -> None:
    assert pixels(data)[0, :, 0].tolist() == expected


def test_a_plain_png_is_sent_as_it_came() -> None:
    data = image_bytes(scene())
    assert as_png(data) is data
    assert shown(data) == ("image/png", data)


@pytest.mark.parametrize(
    "data",
    [
        add_chunk(image_bytes(scene()), b"tEXt", b"Raw profile type exif\0x"),
        add_chunk(image_bytes(scene()), b"gAMA", struct.pack(">I", 45455)),
        add_chunk(image_bytes(scene()), b"acTL", struct.pack(">II", 1, 0)),
        pictures.exif_behind_the_pixels(1),
        image_bytes(scene()) + b"behind the end",
        image_bytes(scene().convert("L")),
        image_bytes(scene(), "JPEG"),
        image_bytes(scene(), "WEBP", lossless=True),
    ],
)
def test_whatever_may_be_read_in_two_ways_is_sent_anew(data: bytes) -> None:
    assert as_png(data) != data


def test_a_photo_stays_small_for_judges_and_pages() -> None:
    data = image_bytes(scene(), "JPEG")
    assert shown(data) == ("image/jpeg", data)
    assert shown(turned("JPEG", 6, "exif"))[0] == "image/png"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt image: it is empty"),
        (b"BM no picture", "corrupt image: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "its header is of none of PNG, JPEG"),
        (image_bytes(scene(), "JPEG2000"), "its header is of none of PNG, JPEG"),
        (image_bytes(scene())[:-30], "corrupt image: "),
        (image_bytes(scene(), "JPEG")[:-30], "corrupt image: "),
    ],
    ids=["empty", "bmp", "eps", "jpeg 2000", "half a png", "half a jpeg"],
)
def test_what_is_no_whole_picture_is_refused_before_it_is_sent(data: bytes, reason: str) -> None:
    for use in (decode_image, as_png):
        with pytest.raises(BadSample, match=reason):
            use(data)
