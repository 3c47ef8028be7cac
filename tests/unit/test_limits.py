"""Open files: the limit is raised as far as ranks need it, or named before they start. Costs 1 s."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
from gspo_mm.runtime.limits import raise_file_limit
raise_file_limit({ranks}, gpus={gpus})
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits(*, hard: int, ranks: int, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(hard=hard, ranks=ranks, gpus=gpus)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize(("ranks", "soft"), [(1, 524), (200, 2912)])
def test_the_limit_is_raised_to_what_so_many_ranks_need(ranks: int, soft: int) -> None:
    assert limits(hard=4000, ranks=ranks).stdout.split() == [str(soft), "4000"]


def test_a_limit_that_cannot_be_enough_is_named_with_the_way_to_raise_it() -> None:
    done = limits(hard=4000, ranks=1024)
    assert done.returncode
    assert "among 1024 ranks a process may need 12800 open files, and ulimit -Hn is 4000" in done.stderr


def test_ranks_with_gpus_need_fewer() -> None:
    assert limits(hard=4000, ranks=1024, gpus=True).stdout.split() == ["3584", "4000"]
