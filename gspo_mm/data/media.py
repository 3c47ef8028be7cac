"""What in a data set looks like a picture, video or sound, by its name, kind or suffix: it must not be dropped unseen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

IMAGE, VIDEO, SOUND = "image", "video", "sound"

_WORDS = {
    IMAGE: "image img imgs picture pic photo photograph screenshot figure fig diagram frame thumbnail pixel_values",
    VIDEO: "video clip movie",
    SOUND: "audio sound speech wav waveform voice",
}
_SUFFIXES = {
    IMAGE: "png jpg jpeg jpe jfif webp bmp gif tif tiff heic heif avif jp2 j2k jxl svg ppm pgm pbm pnm tga ico psd dng exr "
    "hdr pdf dcm",
    VIDEO: "mp4 m4v mov avi mkv webm mpg mpeg flv wmv 3gp ogv ts",
    SOUND: "wav mp3 flac ogg oga opus m4a aac aiff aif wma amr",
}
_KIND_OF_WORD = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# image, images, image_1, img2, imagePath, photo-urls, audio_file, input_image ... and no image_id, image_size, num_images
_NAME = re.compile(
    rf"(?:(?:input|query|question|user|main|multi_modal)_)?(?P<word>{'|'.join(_KIND_OF_WORD)})(?:s|es)?[_-]?\d*[_-]?"
    r"(?:paths?|urls?|files?|file_?names?|names?|bytes|base64|b64|data|list|uris?)?[_-]?\d*",
    re.IGNORECASE,
)
_DEPTH = 4  # of objects and lists inside each other
_LOOKED_AT = 4  # items of a list: what a list holds is of one kind


def kind_of_suffix(suffix: str) -> str | None:
    """IMAGE, VIDEO or SOUND for the suffix of a file, without its dot."""
    return _KIND_OF_SUFFIX.get(suffix.lower())


def names_media(name: str) -> str | None:
    """The kind that a key or column of this name holds, by its name alone."""
    found = _NAME.fullmatch(name.rpartition(".")[2].partition("[")[0])
    return _KIND_OF_WORD[found["word"].lower()] if found else None


def find_media(name: str, value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, str]]:
    """Where `value`, called `name`, holds media: (place, kind). Numbers and flags never do, whatever they are called."""
    if hasattr(value, "tolist"):  # numpy's
        value = value.tolist()
    of_name = names_media(name)
    if isinstance(value, bytes | bytearray) or (
        isinstance(value, Mapping) and value.get("bytes") is not None
    ):
        if value:
            yield name, of_name or IMAGE
    elif isinstance(value, str):
        if value and (kind := _kind_of_text(value) or of_name):
            yield name, kind
    elif isinstance(value, Mapping) and depth:
        for inner, item in value.items():
            yield from find_media(f"{name}.{inner}", item, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for number, item in enumerate(value[:_LOOKED_AT]):
            yield from find_media(f"{name}[{number}]", item, depth - 1)


def _kind_of_text(text: str) -> str | None:
    """Of a data: URL, or a path or address that ends as such files do; None of other text."""
    if text.startswith("data:"):
        return {"image/": IMAGE, "video/": VIDEO, "audio/": SOUND}.get(text[5:11])
    if len(text) > 1000 or len(text.split()) != 1 or "." not in text:
        return None
    return kind_of_suffix(text.partition("?")[0].rpartition(".")[2])
