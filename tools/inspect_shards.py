"""What shards hold: counts, sizes, lengths, what a run would skip, and a page of pictures to look at.

python tools/inspect_shards.py 'data/digits/train-*.tar' --model data/tiny-model --html sheet.html
"""

from __future__ import annotations

import base64
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from gspo_mm.config import DataConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import kind_of, thumbnail
from gspo_mm.data.places import expand_shards
from gspo_mm.data.processor import Processor
from gspo_mm.data.samples import sample_key, to_prompt
from gspo_mm.data.shards import RawSample, read_shard
from gspo_mm.observe.boxes import overlay
from gspo_mm.reward.places import PlaceReader
from gspo_mm.reward.spec import RewardSpec, read_spec
from gspo_mm.types import EncodedImage, GspoError, Prompt

THUMBNAIL = 220  # pixels
QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)


@dataclass
class Facts:
    """What has been seen."""

    samples: int = 0
    bytes: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    per_prompt: Counter[int] = field(default_factory=Counter)  # images of a prompt
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: dict[str, str] = field(default_factory=dict)  # by reason: the sample, and why
    unused: Counter[str] = field(default_factory=Counter)  # members and keys that nothing reads
    keys: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)  # by content
    megapixels: list[float] = field(default_factory=list)
    aspects: list[float] = field(default_factory=list)  # longer side over shorter
    kilobytes: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)  # of a prompt
    chosen: list[Prompt] = field(default_factory=list)  # for the contact sheet


def main(
    shards: Annotated[
        list[str], typer.Argument(help="Paths, globs, {000..007} braces, URLs or pipe: commands.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder whose processor counts tokens. [default: no token lengths]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples to read at most. [default: all]")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page of pictures with their questions and answers.")
    ] = None,
    show: Annotated[
        int, typer.Option(min=1, help="Samples on that page, drawn at random from all that are read.")
    ] = 60,
    seed: Annotated[int, typer.Option(help="Decides which.")] = 0,
    reward: Annotated[
        Path | None,
        typer.Option(help="Reward file: wanted boxes are drawn on that page's pictures, as it reads them."),
    ] = None,
) -> None:
    """Print what the shards hold, and what training would skip and why."""
    try:
        paths = expand_shards(shards)
        processor = Processor(str(model), _settings(shards), shows_pages=True) if model else None
        spec = read_spec(reward) if reward else None
        facts = look(paths, processor, limit=limit, show=show, seed=seed)
    except GspoError as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None
    tell(facts, paths)
    if html:
        html.write_text(sheet(facts, shards, spec))
        typer.echo(f"\n{html}: {len(facts.chosen)} samples")


def _settings(shards: Sequence[str]) -> DataConfig:
    """No limit of length: lengths are what is asked for."""
    return DataConfig(train=list(shards), max_prompt_tokens=sys.maxsize)


def look(
    paths: Sequence[str], processor: Processor | None, *, limit: int | None, show: int, seed: int
) -> Facts:
    """Read every sample once. Raises GspoError when a shard cannot be opened."""
    facts, rng = Facts(), random.Random(seed)
    bars = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("samples", total=limit)
        for raw in islice(_samples(paths), limit):
            progress.advance(bar)
            facts.samples += 1
            facts.bytes += sum(len(value) for value in raw.values() if isinstance(value, bytes))
            try:
                prompt = to_prompt(raw, lambda name: facts.unused.update([name]))
                note(facts, prompt, processor)
            except BadSample as fault:
                facts.refused[fault.reason] += 1
                facts.first_refused.setdefault(fault.reason, f"{sample_key(raw)}: {fault}")
                continue
            # reservoir sampling: every usable sample is as likely to be shown (Vitter 1985, algorithm R)
            if len(facts.chosen) < show:
                facts.chosen.append(prompt)
            elif (place := rng.randrange(facts.tasks.total())) < show:
                facts.chosen[place] = prompt
    return facts


def _samples(paths: Sequence[str]) -> Iterator[RawSample]:
    for path in paths:
        yield from read_shard(path)


def note(facts: Facts, prompt: Prompt, processor: Processor | None) -> None:
    """Count a usable prompt. Raises BadSample when the processor cannot encode it."""
    if processor:
        encoded = processor.encode(prompt)
        facts.prompt_tokens.append(len(encoded.token_ids))
        facts.image_tokens.append(encoded.token_ids.count(processor.image_token_id))
    facts.tasks[prompt.task] += 1
    facts.keys[prompt.key] += 1
    facts.per_prompt[len(prompt.images)] += 1
    for image in prompt.pictures:
        facts.pictures[image.key] += 1
        facts.formats[_format(image)] += 1
        facts.megapixels.append(image.width * image.height / 1e6)
        facts.aspects.append(max(image.width, image.height) / min(image.width, image.height))
        facts.kilobytes.append(len(image.data) / 1e3)


def _format(image: EncodedImage) -> str:
    return " ".join(kind_of(image.data))


def tell(facts: Facts, paths: Sequence[str]) -> None:
    usable, console = facts.tasks.total(), Console()
    counts = Table(box=None, show_header=False, pad_edge=False)
    counts.add_row("shards", f"{len(paths):,}")
    counts.add_row("samples", f"{facts.samples:,}, {facts.bytes / 1e6:,.1f} MB; {usable:,} usable")
    counts.add_row("tasks", _share(facts.tasks))
    counts.add_row("images per prompt", _share(facts.per_prompt))
    counts.add_row("image formats", _share(facts.formats) or "none")
    repeated = sum(count > 1 for count in facts.pictures.values())
    counts.add_row("different images", f"{len(facts.pictures):,}, {repeated:,} of them more than once")
    if twice := sum(count > 1 for count in facts.keys.values()):
        counts.add_row("keys that come twice", f"{twice:,}")
    for name, count in facts.unused.most_common():
        counts.add_row("not read", f"{name}, in {count:,} samples")
    for reason, count in facts.refused.most_common():
        counts.add_row(f"skipped: {reason}", f"{count:,}, first {facts.first_refused[reason][:160]}")
    console.print(counts)
    sizes = Table("", *(f"{q:.0%}" for q in QUANTILES), box=None, pad_edge=False)
    for name, values in (
        ("prompt tokens", facts.prompt_tokens),
        ("image tokens of a prompt", facts.image_tokens),
        ("megapixels", facts.megapixels),
        ("longer side / shorter", facts.aspects),
        ("kilobytes", facts.kilobytes),
    ):
        if values:
            sizes.add_row(name, *(f"{x:,.4g}" for x in np.quantile(values, QUANTILES, method="nearest")))
    if sizes.row_count:
        console.print("\nquantiles", sizes, sep="\n")


def _share(counts: Counter[Any]) -> str:
    """ "digit 5,000 (50 %), ...", at most twelve."""
    total = counts.total()
    shown = [f"{name} {count:,} ({count / total:.0%})" for name, count in counts.most_common(12)]
    return ", ".join(shown) + (f", and {len(counts) - 12} others" if len(counts) > 12 else "")


def sheet(facts: Facts, shards: Sequence[str], spec: RewardSpec | None = None) -> str:
    """The contact sheet: one self-contained page, with the boxes that a reward file wants."""
    reader = PlaceReader(spec, facts.chosen) if spec else None
    cards = [
        {
            "key": prompt.key,
            "task": prompt.task,
            "images": [_thumbnail(image) for image in prompt.pictures],
            "overlay": overlay(reader.read(prompt) if reader else None),
            "messages": [(message["role"], _words(message)) for message in prompt.messages],
            "answer": json.dumps(prompt.answer, ensure_ascii=False),
            "response": prompt.response,
        }
        for prompt in facts.chosen
    ]
    return _PAGE.render(shards=", ".join(shards), samples=facts.samples, cards=cards)


def _words(message: Any) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else "[image] " for part in content)


def _thumbnail(image: EncodedImage) -> dict[str, Any]:
    try:
        shown = thumbnail(image.data, THUMBNAIL)
    except BadSample as fault:  # only its header was read so far
        return {"fault": str(fault)}
    url = "data:image/png;base64," + base64.b64encode(shown).decode()
    return {"url": url, "width": image.width, "height": image.height}


_PAGE = jinja2.Environment(
    loader=jinja2.PackageLoader("gspo_mm.observe", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
).from_string(
    """{% import "boxes.html.j2" as drawn %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ shards }}</title>
<style>
  body { font: 14px/1.45 system-ui, sans-serif; margin: 24px; background: #f4f4f2; color: #222; }
  h1 { font-size: 17px; margin: 0 0 2px; overflow-wrap: anywhere; }
  p { margin: 0 0 16px; color: #666; }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
  article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 12px; overflow-wrap: anywhere; }
  figure { display: inline-block; margin: 0 8px 8px 0; }
  img { display: block; min-width: 96px; max-width: 100%; image-rendering: pixelated; border: 1px solid #eee; }
  figcaption, small, dt { color: #777; font-size: 12px; }
  dl { margin: 6px 0 0; } dd { margin: 0 0 6px; white-space: pre-wrap; max-height: 14em; overflow: auto; }
  dd.answer { font-weight: 600; } .fault { color: #a00; }
{{ drawn.styles() }}</style></head><body>
<h1>{{ shards }}</h1>
<p>{{ cards | length }} of {{ "{:,}".format(samples) }} samples, drawn at random</p>
<main>
{% for card in cards %}
<article>
  {% for image in card.images %}
  {% if image.fault %}
  <p class="fault">{{ image.fault }}; training skips this sample</p>
  {% else %}
  <figure><div class="look"><img src="{{ image.url }}" alt="">
    {%- if loop.first and card.overlay %}{{ drawn.boxes(card.overlay) }}{% endif %}</div>
    <figcaption>{{ image.width }} x {{ image.height }}</figcaption></figure>
  {% endif %}
  {% endfor %}
  <dl>
    {% for role, words in card.messages %}<dt>{{ role }}</dt><dd>{{ words }}</dd>{% endfor %}
    <dt>answer</dt><dd class="answer">{{ card.answer }}</dd>
    {% if card.response is not none %}<dt>reference response</dt><dd>{{ card.response }}</dd>{% endif %}
  </dl>
  <small>{{ card.task }} &middot; {{ card.key }}</small>
</article>
{% endfor %}
</main></body></html>
"""
)


if __name__ == "__main__":
    typer.run(main)
