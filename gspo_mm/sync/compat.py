"""Names of torch 2.11 to 2.15 that are not public, which SGLang's side of a push makes necessary."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def join_group(
    name: str, store: dist.Store, *, size: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """As rank 0 of `size`, a group with processes that are in none of ours. Raises RuntimeError when they do not come.

    SGLang's `init_custom_process_group` is the other side: the same store, prefix and name, and the same helper of torch,
    which knows no public way to a group beside the world's.
    """
    group, _ = c10d._new_process_group_helper(
        size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


class Pickler(pickle._Pickler):
    """Calls torch's function for storages by torch's name, which megatron-core 0.19 replaces in its own processes."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if obj is torch.storage._load_from_bytes:
            self.write(pickle.GLOBAL + b"torch.storage\n_load_from_bytes\n")  # pyright: ignore[reportAttributeAccessIssue]
        else:
            super().save(obj, save_persistent_id)  # pyright: ignore[reportAttributeAccessIssue]
