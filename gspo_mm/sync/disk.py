"""Weights through a folder that trainer and servers see: slow at scale, and nothing else can go wrong.

The folder is a whole Hugging Face folder, as a checkpoint's export is. The one before it is removed once the servers
have read the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from gspo_mm.config import Config
from gspo_mm.families.write import write_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.served import served_template
from gspo_mm.serving.server import Server
from gspo_mm.sync.buckets import MIB
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.quantize import on_the_way


class DiskSender:
    """Sender through `sync.folder`."""

    def __init__(self, config: Config, policy: Policy) -> None:
        self._policy = policy
        self._config = config
        self._on_the_way = on_the_way(config)
        self._folder = exchange_folder(config)
        self._template: Path | None = None  # made with the first push

    def send(self, servers: list[Server], *, version: int, checksums: Checksums) -> None:
        path = self._folder / f"v{version}"
        tensors = self._policy.weights.export(experts_apart=True)
        if self._policy.ranks.main:
            tensors = checksums.noted(self._on_the_way(tensors))
        self._policy.ranks.stream_to_main(tensors, lambda sent: self._write(path, sent))
        with self._policy.ranks.together():
            if self._policy.ranks.main:
                load_folder(servers, path, self._config, version=version)
                for old in self._folder.iterdir():
                    if old != path:
                        shutil.rmtree(old, ignore_errors=True)

    def _write(self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._template = self._template or served_template(self._config)
        write_served(path, self._template, tensors, bucket_mb=self._config.sync.bucket_mb)

    def close(self) -> None:
        if self._policy.ranks.main:
            shutil.rmtree(self._folder, ignore_errors=True)
            if not any(self._folder.parent.glob("*")):  # a folder of its own in sync.folder
                self._folder.parent.rmdir()


def exchange_folder(config: Config) -> Path:
    """Where folders for servers come and go."""
    base = Path(config.sync.folder) / config.run.name if config.sync.folder else config.run.path
    return base.absolute() / "sync"


def write_served(
    path: Path, template: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, bucket_mb: int
) -> None:
    """A folder of these weights for servers to load, in files of half a bucket: SGLang reads a file at a time."""
    write_hf(path, template, tensors, durable=False, shard_bytes=bucket_mb * MIB // 2)


def load_folder(servers: list[Server], path: Path, config: Config, *, version: int) -> None:
    """Let servers read a Hugging Face folder. Raises ServerError."""
    call_all(
        servers,
        "/update_weights_from_disk",
        timeout=config.sync.timeout,
        model_path=str(path),
        weight_version=str(version),
        load_format="auto",  # those of FP8 servers is "dummy", which would be random weights
        flush_cache=not config.rollout.keeps_cache,
    )
