"""The small random model that most parity tests use; made again for each module, which may leave gradients in it."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_vl import save, tiny_vl


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vl()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"))
