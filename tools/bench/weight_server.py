"""What of a rollout server takes weights by broadcast, without a model: it notes a checksum of every tensor that arrives.

    python -m tools.bench.weight_server --load 0.02

Speaks as SGLang 0.5.23 does at POST /init_weights_update_group, /update_weights_from_distributed and around them: one update at a
time, in the order of the requests. Prints its address, then serves until its input ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch.distributed import distributed_c10d as c10d

from gspo_mm.runtime.net import LOOPBACK
from gspo_mm.serving.server import Server

PATIENCE = timedelta(seconds=60)


class Weights:
    """What has arrived."""

    def __init__(self, load: float, last: int) -> None:
        self._load, self._last = load, last
        self._groups: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.buckets: list[list[str]] = []  # names in each, as they came
        self.sums: dict[str, str] = {}

    def take(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        with self._lock:
            if path == "/begin_weight_update":
                self.buckets, self.sums = [], {}
            elif path == "/init_weights_update_group":
                self._join(body)
            elif path == "/destroy_weights_update_group":
                dist.destroy_process_group(self._groups.pop(body["group_name"]))
            elif path == "/update_weights_from_distributed":
                self._receive(body)
            return {"success": True, "buckets": self.buckets, "sums": self.sums}

    def _join(self, body: dict[str, Any]) -> None:
        name, size = body["group_name"], body["world_size"]
        store = dist.TCPStore(body["master_address"], body["master_port"], None, False, PATIENCE)
        group, _ = c10d._new_process_group_helper(
            size,
            body["rank_offset"],
            [],
            dist.Backend(body["backend"]),
            dist.PrefixStore(name, store),
            group_name=c10d.GroupName(name),
            timeout=PATIENCE,
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        self._groups[name] = group

    def _receive(self, body: dict[str, Any]) -> None:
        if len(self.buckets) == self._last:
            os._exit(1)
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [math.prod(shape) * of.itemsize for shape, of in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        self._groups[body["group_name"]].broadcast(flat, 0).wait()
        for name, part in zip(body["names"], flat.split(sizes), strict=True):
            self.sums[name] = sum_of(part)
        self.buckets.append(body["names"])
        time.sleep(self._load)


def sum_of(tensor: torch.Tensor) -> str:
    """Of its bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(data.numpy())).hexdigest()


@contextmanager
def servers(*options: Sequence[str]) -> Iterator[list[Server]]:
    """One in a process of its own for each of `options`."""
    command = [sys.executable, "-m", "tools.bench.weight_server"]
    processes = [
        subprocess.Popen([*command, *of_one], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for of_one in options
    ]
    try:
        urls = [process.stdout.readline().strip() for process in processes if process.stdout]
        yield [
            Server(name=str(number), generation=url, state="up", url=url) for number, url in enumerate(urls)
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(
    load: Annotated[float, typer.Option(help="seconds that a bucket takes to load")] = 0.0,
    last: Annotated[int, typer.Option(help="end when so many buckets of a push have come; -1: never")] = -1,
) -> None:
    """Serve."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = Weights(load, last)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.dumps(weights.take(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://{LOOPBACK}:{server.server_port}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    typer.run(main)
