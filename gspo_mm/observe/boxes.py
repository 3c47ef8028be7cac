"""Boxes drawn on pictures: where each stands, in percent of the picture, and what is written under it. Drawn by boxes.html.j2."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gspo_mm.config.load import load_config
from gspo_mm.reward.grounding import Box
from gspo_mm.reward.places import PlaceReader, Places
from gspo_mm.reward.spec import read_spec
from gspo_mm.types import Completion, GspoError, Prompt

logger = logging.getLogger(__name__)

MAX_BOXES = 20  # drawn of a kind on a picture


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A box in percent of the picture's width and height; what reaches out of the picture is cut off."""

    left: float
    top: float
    width: float
    height: float
    clipped: bool


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """What is drawn on a picture."""

    wanted: list[Frame]
    answered: list[Frame]
    caption: str


def frame(box: Box) -> Frame:
    """Where a box stands, of edges in shares of the picture, in any order."""
    x1, y1, x2, y2 = (100 * min(max(edge, 0.0), 1.0) for edge in box)
    return Frame(
        left=min(x1, x2),
        top=min(y1, y2),
        width=abs(x2 - x1),
        height=abs(y2 - y1),
        clipped=any(not 0 <= edge <= 1 for edge in box),
    )


def overlay(places: Places | None) -> Overlay | None:
    """None where there is nothing to draw."""
    if places is None or not (places.wanted or places.answered):
        return None
    said = [] if places.overlap is None else [f"IoU {places.overlap:.2f}"]
    if any(frame(box).clipped for box in places.answered):
        said.append("reaches out of the picture")
    return Overlay(
        wanted=[frame(box) for box in places.wanted[:MAX_BOXES]],
        answered=[frame(box) for box in places.answered[:MAX_BOXES]],
        caption=", ".join(said),
    )


class RunBoxes:
    """The boxes of a run's prompts and answers, as its reward files say; nothing where they cannot be read any more."""

    def __init__(self, run_dir: Path, prompts: Iterable[Prompt]) -> None:
        self._readers: dict[str, PlaceReader] = {}
        self._default: PlaceReader | None = None
        file = run_dir / "config.yaml"
        if not file.exists():
            return
        prompts = list(prompts)
        try:
            config = load_config(file, any_world=True)
            self._default = PlaceReader(read_spec(config.reward.file), prompts)
            self._readers = {
                source: PlaceReader(read_spec(path), [p for p in prompts if p.source == source])
                for source, path in config.data.reward_files().items()
            }
        except (GspoError, ValueError) as error:
            logger.info("no boxes are drawn on the report's pictures: %s", error)

    def places(self, prompt: Prompt, completion: Completion | None = None) -> Places | None:
        reader = self._readers.get(prompt.source, self._default)
        return reader.read(prompt, completion) if reader else None
