"""Near ties of experts are found on ranks as on one, whatever is split."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.forked import COMMANDS
from tests.parallel.ties import LAYOUTS
from tests.tiny_vl import save, tiny_vl
from tests.unit.test_near_ties import LAST, answered_by, sequences, tied


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, members = tmp_path_factory.mktemp("ties"), sequences()
    model = tiny_vl(num_hidden_layers=LAST + 1, mlp_only_layers=[1]).eval()
    ours, theirs = tied(model, members[1], 6)
    (out / "members").write_bytes(pickle.dumps(answered_by(theirs, members)))
    folder = str(save(ours, out / "hf"))
    command = ["-m", "tests.parallel.ties", str(out), folder, str(out / "members"), *LAYOUTS]
    done = COMMANDS.run(*command, ranks=2, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tie_is_found_under_every_layout(name: str, found: Path) -> None:
    result: dict[str, Any] = pickle.loads((found / f"{name}.pkl").read_bytes())
    first, *others = result["said"]
    assert others == [first], "every rank says the same"
    (said,) = [sentence for sentence in first if "differ at s1," in sentence]
    assert f"a near tie of two experts in layer {LAST} can explain it" in said
    for metrics in result["metrics"]:
        assert metrics["near_ties/explained"] == metrics["near_ties/odd"] == len(first)
