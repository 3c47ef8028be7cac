"""Where commands print tables."""

from rich.console import Console


def table_console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=200)
