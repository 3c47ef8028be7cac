"""How many files a process may have open: every rank that it is connected with takes some."""

from __future__ import annotations

import resource

from gspo_mm.types import GspoError

OWN = 512  # shards, logs, servers, libraries; measured: under 200
# for each other rank, measured: 3 of rank 0 for control, and where there are no GPUs 1 for each of megatron's groups of all
CONTROL, EVERYTHING = 3, 12


def raise_file_limit(ranks: int, *, gpus: bool) -> None:
    """Allow this process the files that it needs among so many ranks. Raises GspoError where the machine forbids that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OWN + (CONTROL if gpus else EVERYTHING) * ranks
    if resource.RLIM_INFINITY not in (soft, hard) and hard < needed:
        raise GspoError(
            f"among {ranks} ranks a process may need {needed} open files, and ulimit -Hn is {hard}; raise it: LimitNOFILE of "
            "slurmd's service, nofile in /etc/security/limits.conf, or the container's --ulimit"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
