"""Where shards are: files, `pipe:` commands and anything that fsspec knows (s3://, gs://, https://, memory:// ...).

A file is checked to exist when its pattern is expanded; a URL without `*` and a command are taken at their word until
they are read, because a request for each of thousands of shards would hold up every start.
"""

from __future__ import annotations

import glob
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import IO

import braceexpand

from gspo_mm.config.paths import from_here
from gspo_mm.types import DataError

_PIPE = "pipe:"
_PATIENCE = 5.0  # seconds that a command may take to end once it was read
_MAX_TAIL = 64  # MiB that a command may write behind the end of its tar


class PipeError(OSError):
    """The command behind a `pipe:` shard failed; what it wrote may be incomplete."""


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Shards behind `{000..031}` braces, globs, URLs and `pipe:` commands, in the order of the patterns, each once.

    Raises DataError naming the first pattern (and, for braces, the path) that matches no file.
    """
    places: dict[str, None] = {}
    for pattern in patterns:
        for place in _braces(pattern):
            found = _find(place)
            if not found:
                via = "" if place == pattern else f" (from {pattern})"
                raise DataError(
                    f"no shard matches {shown(place)}{via}{from_here(place)}; correct data.train or data.validation, or make the "
                    "shards with tools/make_shards.py"
                )
            places |= dict.fromkeys(found)
    return list(places)


def is_url(place: str) -> bool:
    """Whether fsspec reads it."""
    return "://" in place and not place.startswith(_PIPE)


def is_local(place: str) -> bool:
    """Whether it is a file of this machine's file systems."""
    return not is_url(place) and not place.startswith(_PIPE)


def shard_name(place: str) -> str:
    """The last part of a path, URL or command: what samples are called by."""
    return PurePath(shown(place)).name


def shown(text: str) -> str:
    """A place, or what an error says of one, for messages: without the queries of URLs, which may hold a signature."""
    return re.sub(r"(\w+://[^\s?#]+)[?#][^\s'\")]*", r"\1", text)


def reason_of(error: BaseException) -> str:
    """What a store or the system says, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(" ".join(said.split())) or type(error).__name__


@contextmanager
def open_shard(place: str) -> Iterator[IO[bytes]]:
    """The bytes of a shard, from the beginning on.

    Raises DataError when it cannot be opened at all; PipeError on leaving when a command has failed.
    """
    if place.startswith(_PIPE):
        with _command(place.removeprefix(_PIPE)) as stream:
            yield stream
        return
    try:
        file = _open_url(place) if is_url(place) else Path(place).open("rb")  # noqa: SIM115  (closed by the with below)
    except Exception as error:  # every store has errors of its own
        raise DataError(
            f"shard {shown(place)} cannot be opened ({reason_of(error)}); check the path and its permissions"
        ) from None
    with file:
        yield file


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"the braces of shard pattern {pattern} cannot be expanded ({error}); write them as in {{000..031}}"
        ) from None


def _find(place: str) -> list[str]:
    if place.startswith(_PIPE):
        return [place]
    if not is_url(place):
        return sorted(glob.glob(place)) if glob.has_magic(place) else [place] * Path(place).is_file()  # noqa: PTH207
    if "*" not in place:  # "?" and "[" belong to URLs themselves
        return [place]
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(place)
        return sorted(store.unstrip_protocol(str(found)) for found in store.glob(path))
    except (
        Exception
    ) as error:  # every store has errors of its own, and one for a driver that is not installed
        raise DataError(
            f"{shown(place)} cannot be listed ({reason_of(error)}); check the URL and the access to it"
        ) from None


def _open_url(place: str) -> IO[bytes]:
    from fsspec.core import url_to_fs

    store, path = url_to_fs(place)
    return store.open(path, "rb", cache_type="readahead")


@contextmanager
def _command(command: str) -> Iterator[IO[bytes]]:
    """Standard output of a shell command, which is killed with its children when it is not read to the end."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert process.stdout
        try:
            try:
                yield process.stdout
            except Exception:
                _check_status(process, errors)  # why the tar is damaged, if the command knows
                raise
            for _ in range(_MAX_TAIL):  # what stands behind the end of the tar
                if not process.stdout.read(2**20):
                    _check_status(process, errors)
                    break
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def _check_status(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    """Raise PipeError when the command ended with a fault. One that goes on for a while is none: it is killed."""
    with suppress(subprocess.TimeoutExpired):
        if status := process.wait(timeout=_PATIENCE):
            errors.seek(0)
            said = errors.read(2000).decode(errors="replace").strip().partition("\n")[0]
            raise PipeError(f"its command ended with status {status}: {said}")
