"""What is known of one server, and the fault of any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspo_mm.types import GspoError


class ServerError(GspoError):
    """A server could not be started, kept running, or brought to do what was asked."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """How one server is reached, or that it is gone: what RUN/servers holds of it."""

    name: str
    generation: str  # changes whenever the server is started again: its weights are then those of model.path
    state: Literal["up", "down", "stopped"]  # down: will be started again; stopped: it will not
    reason: str = ""  # why it is not up
    url: str = ""
    api_key: str = ""
    admin_key: str = ""
    workers: int = 1  # GPUs, each a rank of a weight-update group
    machine: str = ""  # that it runs on
    first_gpu: int = 0  # of the machine; the others follow


@dataclass(kw_only=True)
class Holding:
    """What a generation of a server holds, as the trainer has brought it there."""

    version: int | None = None  # of its weights; None: those that it started with
    asleep: set[str] = field(default_factory=set)  # what it gave back of its memory
    audited: bool = False  # whether it was seen to hold in FP8 the layers that are sent so
    keeps_ids: bool = False  # whether it was seen to tokenise no prompt again


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key; none where a server was started without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}
