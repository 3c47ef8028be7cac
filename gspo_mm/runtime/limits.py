"""How many files a process may have open: every rank that it is connected with takes some."""

from __future__ import annotations

import resource

from gspo_mm.types import GspoError

OWN = 512  # shards, logs, servers, libraries; measured: under 200
# measured: 2 of rank 0, and 1 for each group of megatron's that holds all ranks and goes over gloo, 9 at most
PER_RANK = 12


def raise_file_limit(ranks: int) -> None:
    """Allow this process the files that it needs among so many ranks. Raises GspoError where the machine forbids that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OWN + PER_RANK * ranks
    if resource.RLIM_INFINITY not in (soft, hard) and hard < needed:
        raise GspoError(
            f"among {ranks} ranks a process may need {needed} open files, and ulimit -Hn is {hard}; raise it: LimitNOFILE of "
            "slurmd's service, nofile in /etc/security/limits.conf, or the container's --ulimit"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
