"""Ranks that each have a part of the weights send at the same time, and servers get every tensor once. Costs 15 s."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest

from tests.forked import COMMANDS
from tests.tiny_vl import save, tiny_vl


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("push")
    folder = save(tiny_vl(num_hidden_layers=8, num_experts=16, moe_intermediate_size=256), out / "hf")
    done = COMMANDS.run("-m", "tests.parallel.push", str(out), str(folder), ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "told.json").read_text())


def buckets(told: dict[str, Any], server: int) -> list[int]:
    """The rank that each bucket of a server came from."""
    names = [frozenset(of_rank) for of_rank in told["names"]]
    return [
        rank
        for bucket in told["servers"][server]["buckets"]
        for rank, own in enumerate(names)
        if own.issuperset(bucket)
    ]


@pytest.mark.parametrize("push", ["plain", "fp8", "after it"])
def test_each_server_gets_every_bit_of_an_export(push: str, told: dict[str, Any]) -> None:
    assert told[push]["fault"] is None
    for server in told[push]["servers"]:
        assert server["sums"] == told[push]["expected"]
        assert sum(map(len, server["buckets"])) == len(server["sums"]), "each tensor once"


@pytest.mark.parametrize("push", ["plain", "fp8"])
def test_senders_go_round_and_begin_with_different_servers(push: str, told: dict[str, Any]) -> None:
    first, second = (buckets(told[push], server) for server in (0, 1))
    senders = [rank for rank, names in enumerate(told[push]["names"]) if names]
    half = len(senders) // 2
    assert first[: len(senders)] == senders
    assert second[: len(senders)] == senders[half:] + senders[:half]
    assert sorted(first) == sorted(second)
    assert max(map(first.count, senders)) > 1
    assert all(a != b for a, b in pairwise(first)), "each is heard before one is heard again"


def test_a_server_that_dies_in_a_push_ends_it_on_all_ranks(told: dict[str, Any]) -> None:
    """Whichever is noticed first: that its reply does not come, or that it left the group."""
    assert re.match(
        r"server 2 failed at /update_weights_from_distributed|the broadcast of weights failed",
        told["dying"]["fault"],
    )
