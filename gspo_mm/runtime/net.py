"""Addresses and ports of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

LOOPBACK = "127.0.0.1"


def machine_name() -> str:
    """Its name for people: Slurm's, where Slurm runs us."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def address_towards(hosts: Iterable[str]) -> str:
    """This machine's address on the way to others: loopback when all of them are here."""
    addresses = set()
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: only the route is looked up
            addresses.add(probe.getsockname()[0])
    return next((address for address in sorted(addresses) if not address.startswith("127.")), LOOPBACK)
