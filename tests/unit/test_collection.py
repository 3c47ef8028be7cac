"""No test is left out by its folder's name: pytest does not look into folders called dist, build or venv."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_pytest_looks_into_every_folder_that_has_tests(pytestconfig: pytest.Config) -> None:
    left_out = pytestconfig.getini("norecursedirs")
    folders = {folder for file in TESTS.rglob("test_*.py") for folder in file.relative_to(TESTS).parents}
    assert {"unit", "parallel"} <= {folder.name for folder in folders}
    assert not [
        folder for folder in folders for pattern in left_out if folder.name and fnmatch(folder.name, pattern)
    ]
