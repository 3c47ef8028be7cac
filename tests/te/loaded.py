"""The stand-in, installed by this import, and what ranks need after it: to be loaded once and forked (tests/forked.py)."""

from tests.te.stand_in import install

install()

import gspo_mm.policy.engine  # noqa: E402, F401
import tests.parallel.layouts  # noqa: E402, F401
import tools.check_parity  # noqa: E402, F401
