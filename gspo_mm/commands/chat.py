"""`gspo-mm chat`: questions to a model, on the embedded engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from gspo_mm.config import DataConfig
from gspo_mm.config.paths import from_here
from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import measure
from gspo_mm.data.processor import Processor
from gspo_mm.families.folder import read_hf
from gspo_mm.inputs import check_model
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.types import EncodedImage, Finish, GspoError, Prompt, SamplingParams


class Chat:
    """A conversation with one model. Pictures stand in front of the first question."""

    def __init__(
        self, model: Path, pictures: Sequence[EncodedImage], *, sampling: SamplingParams, seed: int
    ) -> None:
        """Load the model: in bfloat16 on a GPU, else in float32. Raises a GspoError naming what cannot be read."""
        check_model(model)
        # no shard is read, and no question is too long
        self._processor = Processor(str(model), DataConfig(train=["none"], max_prompt_tokens=sys.maxsize))
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self._engine = EmbeddedEngine(str(model), self._processor, dtype=dtype, max_batch=1)
        self._engine.load_weights(read_hf(model), version=0)
        self._pictures, self._sampling, self._seed = tuple(pictures), sampling, seed
        self._messages: list[Mapping[str, Any]] = []

    def ask(self, question: str) -> str:
        """The answer, which later questions follow. Raises GspoError where the model cannot be asked that."""
        shown = [] if self._messages else [{"type": "image"}] * len(self._pictures)
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
        messages = (*self._messages, asked)
        prompt = Prompt(key="chat", messages=messages, images=self._pictures, answer="", task="")
        try:
            encoded = self._processor.encode(prompt)
        except BadSample as fault:
            raise GspoError(f"the model cannot be asked that: {fault}") from None
        seed = derive_seed(self._seed, "chat", len(messages))
        ((answer,),) = self._engine.generate([encoded], group_size=1, sampling=self._sampling, seed=seed)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        if answer.finish is Finish.LENGTH:
            typer.secho(f"(cut off: --max-new-tokens {self._sampling.max_new_tokens})", dim=True, err=True)
        return answer.text


def ask_by_line(chat: Chat) -> None:
    """Each line of the standard input is a question, up to its end (Ctrl-D)."""
    if sys.stdin.isatty():
        typer.secho("one question a line; Ctrl-D ends", dim=True, err=True)
    for line in sys.stdin:
        if question := line.strip():
            try:
                typer.echo(chat.ask(question))
            except GspoError as error:
                typer.secho(str(error), fg="red", err=True)


def pictures_of(files: Sequence[Path]) -> list[EncodedImage]:
    """Read pictures. Raises GspoError naming one that is missing, or none."""
    pictures = []
    for file in files:
        try:
            data = file.read_bytes()
            width, height = measure(data)
        except OSError as error:
            raise GspoError(f"--image {file} cannot be read: {error.strerror}{from_here(file)}") from None
        except BadSample as fault:
            raise GspoError(f"--image {file} is no picture that can be shown: {fault}") from None
        pictures.append(EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height))
    return pictures
