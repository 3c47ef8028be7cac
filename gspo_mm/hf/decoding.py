"""Sampled ids as text, in any process: without transformers, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Decoder:
    """Text of token ids, special tokens left out. It can be sent to another process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token_ids: Iterable[int]) -> str:
        # of a batch, as this alone lets other threads run
        (text,) = self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=True)
        return text
