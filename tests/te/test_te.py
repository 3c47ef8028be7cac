"""The policy on Transformer Engine's layers, without a GPU.

Files of inside/ run in processes of their own, since the stand-in changes torch.cuda for good: two for those that are of a
single rank, which cost 2 to 3 minutes and up to 10 GB each, and one that starts ranks (2 to 3 minutes).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# transformer_engine's Python code, which must not be seen by other tests: without its library it cannot be imported
SITE = Path(sys.prefix) / "te"


RANKS = HERE / "inside" / "inside_ranks.py"
ALONE = sorted({*RANKS.parent.glob("inside_*.py")} - {RANKS})


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "files", [ALONE[::2], ALONE[1::2], [RANKS]], ids=["one rank", "one rank too", "ranks"]
)
def test_inside(files: list[Path]) -> None:
    assert (SITE / "transformer_engine").is_dir(), "make .venv/dev installs transformer_engine there"
    done = subprocess.run(
        [sys.executable, "-m", "tests.te.inside", *map(str, files)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{SITE}", "PYTEST_ADDOPTS": "", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
