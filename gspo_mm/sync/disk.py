"""Weights through a folder that trainer and servers see: slow at scale, and nothing else can go wrong.

The folder is a whole Hugging Face folder, as a checkpoint's export is. The one before it is removed once the servers
have read the new one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gspo_mm.config import Config
from gspo_mm.families.write import write_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.registry import Registration
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.sync.checksums import Checksums


class DiskSender:
    """Sender through `sync.folder`."""

    def __init__(self, config: Config, policy: Policy, engine: SGLangEngine | None) -> None:
        self._policy = policy
        self._engine = engine
        self._model = config.model
        self._timeout = config.sync.timeout
        base = Path(config.sync.folder) / config.run.name if config.sync.folder else config.run.path
        self._folder = base.absolute() / "sync"

    def send(self, servers: list[Registration], *, version: int, checksums: Checksums) -> None:
        path = self._folder / f"v{version}"

        self._policy.ranks.stream_to_main(
            checksums.noted(self._policy.export()),
            lambda tensors: write_hf(
                path, self._model.path, tensors, experts_layout=self._model.experts_layout, durable=False
            ),
        )
        with self._policy.ranks.together():
            if self._engine:
                self._engine.run(
                    load_folder(self._engine, servers, path, version=version, timeout=self._timeout)
                )
                for old in self._folder.iterdir():
                    if old != path:
                        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        if self._policy.ranks.main:
            shutil.rmtree(self._folder, ignore_errors=True)
            if not any(self._folder.parent.glob("*")):  # a folder of its own in sync.folder
                self._folder.parent.rmdir()


async def load_folder(
    engine: SGLangEngine, servers: list[Registration], path: Path, *, version: int, timeout: float
) -> None:
    """Let servers read a Hugging Face folder. Raises ServerError."""
    await engine.control_all(
        servers,
        "/update_weights_from_disk",
        timeout=timeout,
        model_path=str(path),
        weight_version=str(version),
        flush_cache=True,
    )
