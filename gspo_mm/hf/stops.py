"""Where an answer ends: the tokens that stop it, and what a reference response ends with.

A folder says it in several places, which need not agree. An answer stops at every one of them: at the chat template's
end of turn, which the model was taught to write, and at the end tokens of generation_config.json, tokenizer and
config.json, where servers stop whatever they are asked. A reference response gets the template's.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_mm.hf.headers import HfFolderError, read_json
from gspo_mm.hf.processor import tokenizer_of

logger = logging.getLogger(__name__)

TEMPLATE, TOKENIZER = "chat template", "tokenizer"

# what a template may trim or change the case of without changing it, and that it never writes by itself
_ANSWER, _QUESTION = "7319462058", "4186037295"


@dataclass(frozen=True, kw_only=True)
class Stops:
    """The end tokens of a model."""

    # token id -> who names it; the one that ends a reference response is first
    sources: Mapping[int, tuple[str, ...]]
    # what stands behind the text of a reference response, that token last
    end_of_turn: str

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self.sources)

    def describe(self, tokenizer: Any) -> str:
        named = (f"{tokenizer.decode([i])} ({i}: {', '.join(by)})" for i, by in self.sources.items())
        return (
            f"an answer ends at {' or '.join(named)}; supervised training ends it with {self.end_of_turn!r}"
        )


def find_stops(path: str, processor: Any, vocab_size: int) -> Stops:
    """The end tokens of a folder. Raises HfFolderError when nothing says where an answer ends, or no token can."""
    tokenizer = tokenizer_of(processor)
    sources: dict[int, list[str]] = {}
    for source, token in _named(Path(path), tokenizer):
        if isinstance(token, bool) or not isinstance(token, int):
            raise HfFolderError(
                f"{path}: eos_token_id in {source} is {token!r}; it must be a token's number or a list of them"
            )
        if not 0 <= token < vocab_size:
            logger.warning(
                "%s: eos_token_id %d in %s is none of the model's %d tokens and stops nothing",
                path,
                token,
                source,
                vocab_size,
            )
        elif source not in sources.setdefault(token, []):
            sources[token].append(source)
    written = _end_of_turn(path, processor, known=sources)
    by: tuple[str, ...] = (TEMPLATE,)
    if written is None:
        if not sources:
            raise HfFolderError(
                f"{path}: neither chat template nor tokenizer nor generation_config.json names a token that ends an "
                "answer; name one as eos_token in tokenizer_config.json"
            )
        first = next(iter(sources))
        written, by = (first, tokenizer.decode([first])), ()
        logger.warning(
            "%s: the chat template ends an answer with no token; supervised training ends it with %s, named by %s",
            path,
            written[1],
            " and ".join(sources[first]),
        )
    end, text = written
    named = {end: (*by, *sources.pop(end, ()))}
    return Stops(sources=named | {token: tuple(by) for token, by in sources.items()}, end_of_turn=text)


def _named(path: Path, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """(file, token id) of every end token that is set, the tokenizer's first."""
    config = read_json(path / "config.json")
    generation = path / "generation_config.json"
    named = {
        TOKENIZER: tokenizer.eos_token_id,
        generation.name: read_json(generation).get("eos_token_id") if generation.is_file() else None,
        "config.json": config.get("eos_token_id"),
    }
    if named[generation.name] is None:  # transformers falls back on it too
        named["text_config of config.json"] = config.get("text_config", {}).get("eos_token_id")
    for source, value in named.items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None:
                yield source, token


def _end_of_turn(path: str, processor: Any, *, known: Collection[int]) -> tuple[int, str] | None:
    """The token with which the chat template ends an answer, and the text behind the answer up to it.

    It is the first of the tokenizer's added tokens, or of those `known` as end tokens, behind a rendered answer; None
    when there is none. Raises HfFolderError when the template ends answers with words that no token stands for.
    """
    added = {*tokenizer_of(processor).added_tokens_decoder, *known}
    last = _render(processor, _ANSWER)
    if last is None:
        return None
    behind = last.rpartition(_ANSWER)[2]
    if found := _first(tokenizer_of(processor), behind, added):
        return found
    if behind.strip():
        raise HfFolderError(
            f"{path}: the chat template ends an answer with {behind.strip()!r}, for which the tokenizer has no token, so "
            "that no answer would stop there; add it to the tokenizer as one token, or let the template end with an "
            "end token"
        )
    # a template may end a turn only where another one follows; what begins a turn is no end
    followed = _render(processor, _ANSWER, _QUESTION)
    if followed is None:
        return None
    rest = followed.partition(_ANSWER)[2]
    opening = tokenizer_of(processor)(followed.partition(_QUESTION)[0], add_special_tokens=False)["input_ids"]
    return _first(tokenizer_of(processor), rest.partition(_QUESTION)[0], added.difference(opening))


def _first(tokenizer: Any, text: str, wanted: Collection[int]) -> tuple[int, str] | None:
    """The first token of `text` among those `wanted`, and the text up to and with it."""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in wanted:
            before, end, _ = text.partition(tokenizer.decode([token]))
            return (token, before + end) if end else None
    return None


def _render(processor: Any, answer: str, *more: str) -> str | None:
    """A conversation with `answer` in it, and another question where one is given; None when the template refuses it."""
    turns = [("user", _QUESTION), ("assistant", answer), *(("user", text) for text in more)]
    for content in (lambda text: [{"type": "text", "text": text}], lambda text: text):
        messages = [{"role": role, "content": content(text)} for role, text in turns]
        try:
            rendered = processor.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs of the model's makers: they raise what they like
            logger.debug("the chat template refuses an answer: %s", error)
            continue
        if answer in rendered:
            return rendered
    return None
