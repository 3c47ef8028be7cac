"""One log format: on stderr for whoever watches, in RUN/log.txt for whoever comes later."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

# one console for log lines and the progress bar, so that a line is printed above the bar and not across it
CONSOLE = Console(stderr=True)

_NOISY = ("megatron", "transformers", "PIL", "matplotlib", "urllib3", "httpx", "torch.distributed")


def setup_logging(run_dir: Path | None = None, *, rank: int = 0) -> None:
    """Configure the root logger; may be called again for another run. Python warnings are logged too.

    Ranks other than 0 show warnings only, and write to a file of their own.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    console = _console(f"[rank {rank}] " if rank else "")
    console.setLevel(logging.WARNING if rank else logging.INFO)
    root.addHandler(console)
    if run_dir is not None:
        file = logging.FileHandler(run_dir / (f"log-rank-{rank:05d}.txt" if rank else "log.txt"))
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        root.addHandler(file)
        console.addFilter(
            lambda record: record.name != "py.warnings"
        )  # libraries' words to their callers: in the file
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").filters = [_Once()]
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


class _Once(logging.Filter):
    """Lets a warning of Python's through once; Python itself forgets what it has shown with every `catch_warnings`."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._seen
        self._seen.add(text)
        return new


def log_to_file(message: str) -> None:
    """Put an error into RUN/log.txt alone; whoever watches sees it in another way."""
    record = logging.LogRecord("gspo_mm", logging.ERROR, "", 0, message, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)


def _console(prefix: str) -> logging.Handler:
    if sys.stderr.isatty() and not prefix:
        return RichHandler(console=CONSOLE, show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", datefmt="%H:%M:%S")
    )
    return handler
