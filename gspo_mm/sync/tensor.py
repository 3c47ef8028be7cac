"""Weights as tensors in the update requests themselves, for servers beside the trainer.

On GPUs a request holds a handle of the bucket's memory (CUDA IPC), which a worker of the server on the same GPU opens:
nothing is copied but GPU to GPU. Every rank gathers all weights into its own bucket and gives the handle for the
worker on its GPU. Without GPUs the bytes themselves are in the request, since SGLang's way of sharing host memory
ends its server; that is for laptops and tests, where disk and distributed serve as well.

Requests are pickles of plain torch tensors and names, which is what SGLang's own client sends.
"""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing  # teaches ForkingPickler about tensors

from gspo_mm.config import Config
from gspo_mm.policy.engine import Policy
from gspo_mm.runtime.dist import device
from gspo_mm.serving.admin import Calls, begin_update, end_update, results
from gspo_mm.serving.server import Server, ServerError
from gspo_mm.sync.buckets import MIB, Bucket, Buffers
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.compat import Pickler
from gspo_mm.sync.quantize import on_the_way

_COPIES = 6  # of a bucket that travels by value: itself, one cut to size, torch's bytes of it and the request's, twice
_CHUNK = 3 * 2**18  # bytes turned into base64 at a time: a multiple of 3


class TensorSender:
    """Sender in the update requests."""

    def __init__(self, config: Config, policy: Policy) -> None:
        self._policy = policy
        self._ranks = policy.ranks
        self._sync = config.sync
        self._on_the_way = on_the_way(config)
        self._flush = not config.rollout.keeps_cache
        self._by_value = device().type == "cpu"
        self._gpus = self._ranks.gather((socket.gethostname(), device().index))  # of all ranks

    def send(self, servers: list[Server], *, version: int, checksums: Checksums) -> None:
        tensors = self._on_the_way(self._policy.weights.export(experts_apart=True))
        if self._ranks.main:  # on the others are the same ones
            tensors = checksums.noted(tensors)
        with Calls(servers, timeout=self._sync.timeout) as calls:
            with self._ranks.together():
                if self._ranks.main:
                    begin_update(calls)
            self._send(tensors, calls)
            with self._ranks.together():
                if self._ranks.main:
                    end_update(calls, version=version, flush=self._flush)

    def close(self) -> None:
        pass

    def _send(self, tensors: Iterator[tuple[str, torch.Tensor]], calls: Calls) -> None:
        """All ranks go from bucket to bucket together, so a fault finds all of them at the same one."""
        bucket_bytes = self._sync.bucket_mb * MIB
        if self._by_value:
            buffers = Buffers(2 * bucket_bytes // _COPIES, device(), turns=1)
        else:
            buffers = Buffers(bucket_bytes, device())
        under_way: list[Future[dict[str, Any]]] = []
        for bucket in buffers.fill(self._policy.family.prefixes.renamed(tensors)):
            requests = self._requests(bucket, calls.servers)
            with self._ranks.together():
                if self._ranks.main:
                    results(under_way)
                    under_way = calls.start_raw("/update_weights_from_tensor", requests)
                    if self._by_value:  # there is one buffer only
                        results(under_way)
        with self._ranks.together():
            results(under_way)

    def _requests(self, bucket: Bucket, servers: list[Server]) -> list[Body]:
        """One body for each server, on rank 0; empty elsewhere."""
        if self._by_value:
            return (
                [Body([by_value(bucket)] * server.workers) for server in servers] if self._ranks.main else []
            )
        torch.cuda.current_stream().synchronize()  # the servers read without waiting for our copies
        handles = self._ranks.gather(bytes(ForkingPickler.dumps(contents(bucket, bucket.flat))))
        with self._ranks.together():
            return [Body([handles[rank] for rank in self._sharing(server)]) for server in servers]

    def _sharing(self, server: Server) -> list[int]:
        """The ranks on the GPUs of a server's workers, in the workers' order."""
        gpus = [(server.machine, server.first_gpu + worker) for worker in range(server.workers)]
        for machine, gpu in gpus:
            if (machine, gpu) not in self._gpus:
                raise ServerError(
                    f"server {server.name} uses GPU {gpu} of {machine or 'another machine'}, where no rank trains; "
                    "sync.mode=tensor is for servers on the trainer's own GPUs: use sync.mode=distributed"
                )
        return [self._gpus.index(gpu) for gpu in gpus]


class Body:
    """Body of POST /update_weights_from_tensor with one pickle per worker, written piece by piece."""

    def __init__(self, pickles: list[bytes]) -> None:
        self._pickles = pickles

    def __iter__(self) -> Iterator[bytes]:
        settings = {"load_format": "flattened_bucket", "flush_cache": False}
        yield json.dumps(settings).encode()[:-1] + b', "serialized_named_tensors": ['
        for number, pickled in enumerate(self._pickles):
            yield b', "' if number else b'"'
            view = memoryview(pickled)
            for start in range(0, len(view), _CHUNK):
                yield base64.b64encode(view[start : start + _CHUNK])
            yield b'"'
        yield b"]}"


def by_value(bucket: Bucket) -> bytes:
    """The pickle of a bucket in host memory, its bytes included."""
    file = io.BytesIO()
    # a tensor is pickled with all of the memory that it is a part of
    Pickler(file, protocol=4).dump(contents(bucket, bucket.flat.clone()))
    return file.getvalue()


def contents(bucket: Bucket, flat: torch.Tensor) -> dict[str, Any]:
    """What SGLang takes for its `flattened_bucket`."""
    sizes = [
        shape.numel() * dtype.itemsize for shape, dtype in zip(bucket.shapes, bucket.dtypes, strict=True)
    ]
    ends = list(accumulate(sizes))
    fields = zip(bucket.names, bucket.shapes, bucket.dtypes, sizes, ends, strict=True)
    metadata = [
        SimpleNamespace(name=name, shape=shape, dtype=dtype, start_idx=end - size, end_idx=end, numel=size)
        for name, shape, dtype, size, end in fields
    ]
    return {"flattened_tensor": flat, "metadata": metadata}
