"""tools/check_parity.py prints one JSON line and says by its exit status whether the policy is the model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_vl import save, tiny_text, tiny_vl
from tools.check_parity import app, random_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vl(num_hidden_layers=3), tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("images", ["0", "1", "5"])
def test_a_folder_within_tolerance_exits_0_with_one_line_of_json(folder: Path, images: str) -> None:
    result = CliRunner().invoke(app, ["--hf", str(folder), "--images", images, "--seed", "4"])
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert 0 < found["max_abs_logprob"] < 2e-5
    assert 0 < found["max_rel_grad"] < 1e-4
    assert found["roundtrip_exact"] is True
    assert found["plan"] == {"tp": 1, "ep": 1, "etp": 1, "pp": 1, "cp": 1, "dp": 1}


@pytest.mark.parametrize("option", ["--tol-logprob", "--tol-grad"])
def test_beyond_tolerance_it_exits_1(folder: Path, option: str) -> None:
    assert CliRunner().invoke(app, ["--hf", str(folder), option, "0"]).exit_code == 1


def test_a_folder_that_is_none_exits_2_with_the_reason(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--hf", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no config.json" in result.stderr


def test_prompts_hold_no_padding_whose_embedding_transformers_does_not_train() -> None:
    tokens = random_batch(tiny_text(moe=False, num_hidden_layers=1, vocab_size=5, pad_token_id=3)).token_ids
    assert set(tokens.tolist()) == {0, 1, 2, 4}
