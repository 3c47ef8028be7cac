"""Servers that tokenise again what they are sent as ids, found before they are asked for answers in turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.rollout.requests import RetokenizedError
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.server import ServerError
from tests.fake_server import FakeServer, drop, reply, status
from tests.unit.test_conversations import conversations
from tests.unit.test_sglang_client import open_engine

SHOWN = 16  # tokens of the probe's picture


class Reads(FakeServer):
    """Expands a prompt's image token as servers do: of the ids that came, or of those that it makes of their text."""

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.keeps_ids = True
        self._tokenizer, self._image = processor._tokenizer, processor.image_token_id
        self.answer = self._read

    def _read(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        (ids,) = body["input_ids"]
        if not self.keeps_ids:
            ids = self._tokenizer(self._tokenizer.decode(ids))["input_ids"]
        place = ids.index(self._image)
        return [reply([*ids[:place], *[self._image] * SHOWN, *ids[place + 1 :]], [10])]


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Processor:
    return Processor(str(tiny_model), DataConfig(train=["x"]))


@pytest.fixture
def server(processor: Processor) -> Iterator[Reads]:
    server = Reads(processor)
    yield server
    server.close()


@pytest.fixture
def engine(
    server: Reads, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SGLangEngine]:
    engine = open_engine(tmp_path, server)
    monkeypatch.setattr(engine, "_processor", processor)
    monkeypatch.setattr(engine, "_conversations", conversations(processor))
    yield engine
    engine.close()


def hold(engine: SGLangEngine, version: int) -> None:
    engine.run(engine.hold(version, engine.fleet.up()))


def test_a_server_that_keeps_ids_is_asked_once(engine: SGLangEngine, server: Reads) -> None:
    hold(engine, 1)
    hold(engine, 2)
    (asked,) = server.prompts()
    assert len(asked.body["image_data"][0]) == 1
    assert engine.version == 2


def test_a_server_that_tokenises_again_is_refused(engine: SGLangEngine, server: Reads) -> None:
    server.keeps_ids = False
    with pytest.raises(RetokenizedError, match=rf"server-0 at {server.url} .*SGLANG_MM_AVOID_RETOKENIZE=1"):
        hold(engine, 1)
    assert engine.version == 0


def test_a_server_that_cannot_read_the_probe_is_refused(engine: SGLangEngine, server: Reads) -> None:
    """As SGLang's processor of GLM-4V does, which masks the ids as if they were those of their text."""
    server.script.append(status(500))
    with pytest.raises(RetokenizedError, match=r"answered 500: .no., to a probe of ids"):
        hold(engine, 1)
    assert engine.version == 0


def test_a_server_that_is_gone_is_brought_the_weights_again(engine: SGLangEngine, server: Reads) -> None:
    server.script.append(drop)
    with pytest.raises(ServerError, match="a probe was not answered"):
        hold(engine, 1)
    hold(engine, 1)
    assert engine.version == 1


def test_without_turns_no_server_is_asked(
    engine: SGLangEngine, server: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_conversations", None)
    hold(engine, 1)
    assert not server.prompts()
