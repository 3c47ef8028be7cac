"""What a judge said, on disk: no verdict is asked or paid for twice, and what was paid is known after a restart."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

_TABLE = """CREATE TABLE IF NOT EXISTS verdicts (
    request TEXT PRIMARY KEY,  -- SHA-256 of all that the judge was sent
    reply TEXT NOT NULL,       -- its message
    cost REAL NOT NULL
) WITHOUT ROWID"""


class Reply(NamedTuple):
    """A judge's message."""

    text: str
    cost: float  # in the currency of the prices


class Verdicts:
    """One SQLite file, which several processes may share. All methods belong to one thread."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or sqlite3.Error where the file cannot be used."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # each statement is on disk when it returns
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._file.execute(_TABLE)

    def find(self, request: str) -> Reply | None:
        found = self._file.execute(
            "SELECT reply, cost FROM verdicts WHERE request = ?", (request,)
        ).fetchone()
        return Reply(*found) if found else None

    def add(self, request: str, reply: Reply) -> None:
        self._file.execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (request, reply.text, reply.cost)
        )

    def spent(self) -> float:
        """What all verdicts in the file cost, in the currency of their prices."""
        return self._file.execute("SELECT COALESCE(SUM(cost), 0) FROM verdicts").fetchone()[0]

    def close(self) -> None:
        self._file.close()


def key_of(url: str, body: dict[str, Any]) -> str:
    """Equal for equal requests to the same judge."""
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()


def default_path() -> Path:
    """$XDG_CACHE_HOME/gspo_mm/verdicts.sqlite, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gspo_mm" / "verdicts.sqlite"
