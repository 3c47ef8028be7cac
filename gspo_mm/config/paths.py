"""Paths of configs are as a shell takes them: relative ones count from the current folder."""

from __future__ import annotations

from pathlib import Path


def from_here(path: str | Path) -> str:
    """For sentences about a path that is not there: the folder that a relative one was looked up from, or nothing."""
    text = str(path)
    if Path(text).is_absolute() or "://" in text or text.startswith("pipe:"):
        return ""
    return f" (looked up from the current folder, {Path.cwd()})"
