"""Runs files of tests with the stand-in installed: python -m tests.te.inside FILE... [pytest's options]"""

import sys

import pytest

from tests.te.stand_in import install

install()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
