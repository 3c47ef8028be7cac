"""How a command ends that cannot do what it was asked: one sentence, where a person, a log and a launcher look for it."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from gspo_mm.runtime.disk import refusal
from gspo_mm.runtime.log import log_to_file
from gspo_mm.types import GspoError


def run_reporting_faults(command: Callable[[], Any]) -> None:
    """Run `command`; a user's mistake or a disk that refuses ends it with one sentence and status 2 (`GspoError.status`).

    Of many ranks with the same fault one per node reports it, or the one that had it.
    """
    try:
        command()
        return
    except GspoError as error:
        message, status = str(error), error.status
        _tell_launcher(message)
        if error.told_elsewhere or os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(status)
    except Exception as error:
        if not isinstance(error, OSError) or (said := refusal(error)) is None:
            log_to_file(traceback.format_exc())  # a terminal's text may be lost
            raise
        message = f"{error.filename or 'a file of the run'} cannot be read or written: {said}"
        status = 2
        _tell_launcher(message)
    log_to_file(message)
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    sys.exit(status)


def _tell_launcher(message: str) -> None:
    """Have torchrun end its report of a failed rank with our sentence; it cannot be kept from writing one."""
    if not (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return
    extra = {"timestamp": str(int(time.time()))}  # torchrun takes the earliest for the root cause
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
