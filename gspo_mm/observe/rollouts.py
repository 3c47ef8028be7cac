"""Save scored groups with their images, to look at them and to train on them again (`rollout.replay`).

RUN/rollouts/step-00000010.jsonl.gz   one group a line, exact numbers
RUN/rollouts/images/<sha256>          encoded bytes, once per distinct image
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_mm.rollout.saved import decode_answers, encode_answers, image_by_key
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import EncodedImage, Prompt, RolloutGroup


def save_rollouts(run_dir: Path, step: int, groups: list[RolloutGroup]) -> Path:
    """Write the groups of a step; the file appears when it is whole."""
    folder = run_dir / "rollouts"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in {image.key: image for group in groups for image in images_of(group)}.values():
        path = folder / "images" / image.key  # a SHA-256 in hexadecimal: no name from outside
        if not path.exists():
            with written_whole(path) as file:
                file.write_bytes(image.data)
    final = folder / f"step-{step:08d}.jsonl.gz"
    with written_whole(final) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        for group in groups:
            file.write(json.dumps(_encode(group)) + "\n")
    return final


def load_rollouts(run_dir: Path, step: int) -> list[RolloutGroup]:
    """The groups as they were saved: equal token ids, log-probs, scores and images."""
    folder = Path(run_dir) / "rollouts"
    with gzip.open(folder / f"step-{step:08d}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [
            decode_group(json.loads(line), lambda key: (folder / "images" / key).read_bytes())
            for line in file
        ]


def list_steps(run_dir: Path) -> list[int]:
    """Steps whose rollouts were saved, in order."""
    files = (Path(run_dir) / "rollouts").glob("step-*.jsonl.gz")
    return sorted(int(path.name.removesuffix(".jsonl.gz").removeprefix("step-")) for path in files)


def _encode(group: RolloutGroup) -> dict[str, Any]:
    images = [image_by_key(image) for image in group.prompt.images]
    prompt = {f.name: getattr(group.prompt, f.name) for f in dataclasses.fields(Prompt)} | {"images": images}
    return {
        "id": group.id,
        "prompt": prompt,
        "prompt_ids": group.prompt_ids,
        **encode_answers(group, image_by_key),
        "advantages": group.advantages,
    }


def decode_group(line: dict[str, Any], read_image: Callable[[str], bytes]) -> RolloutGroup:
    """One saved line, with images as they are read by their keys."""

    def take(saved: dict[str, Any]) -> EncodedImage:
        return EncodedImage(data=read_image(saved["key"]), **saved)

    prompt = line["prompt"]
    prompt |= {"images": tuple(map(take, prompt["images"])), "messages": tuple(prompt["messages"])}
    group = RolloutGroup(
        id=line["id"],
        prompt=Prompt(**prompt),
        prompt_ids=tuple(line["prompt_ids"]),
        completions=(),
        advantages=tuple(line["advantages"]),
    )
    return decode_answers(group, line, take)


def images_of(group: RolloutGroup) -> list[EncodedImage]:
    """Those of the question and those that came back, as often as they were shown."""
    seen = [image for c in group.completions for o in c.observations for image in o.images]
    return [*group.prompt.images, *seen]
