"""Prompts whose pictures are unlike the others': what two decoders may see differently is looked at first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice

from gspo_mm.data.pictures import kind_of
from gspo_mm.types import EncodedImage, Prompt


def odd_ones(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """At most `count` of the prompts with pictures: one for each trait, the rarest trait first."""
    seen: Counter[str] = Counter()
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        for trait in dict.fromkeys(trait for image in prompt.images for trait in traits(image)):
            seen[trait] += 1
            first.setdefault(trait, prompt)
    rarest = sorted(seen, key=lambda trait: seen[trait])
    return list(islice({first[trait].key: first[trait] for trait in rarest}.values(), count))


def traits(image: EncodedImage) -> tuple[str, str, str]:
    """Kind, size and shape of a picture; sizes by powers of 4, shapes by powers of 2."""
    size = round(math.log(image.width * image.height, 4))
    shape = round(math.log2(image.width / image.height))
    return " ".join(kind_of(image.data)), f"about {4**size} pixels", f"about 2^{shape} times as wide as high"


def describe(image: EncodedImage) -> str:
    """ "JPEG RGB orientation 6, 3024x4032" """
    return f"{' '.join(kind_of(image.data))}, {image.width}x{image.height}"
