"""A layout given on a tool's command line."""

import pytest

from gspo_mm.config import ConfigError, ParallelConfig
from gspo_mm.runtime.launch import parse_plan, ranks_needed, start_ranks


def test_a_plan_is_sizes_by_key() -> None:
    assert parse_plan("tp=2,ep=4,etp=1") == ParallelConfig(tp=2, ep=4, etp=1)
    assert parse_plan("") == ParallelConfig()


@pytest.mark.parametrize("text", ["tp", "tp=two", "xp=2", "tp=2;ep=2", "tp=-1"])
def test_what_is_no_plan_is_refused_with_the_keys_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not KEY=NUMBER with a key of tp, pp, vpp"):
        parse_plan(text)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--plan vpp=2: .*policy\.parallel\.pp=1 has no stages for vpp=2"):
        parse_plan("vpp=2")
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        parse_plan("tp=0")


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("", 1),
        ("tp=2", 2),
        ("ep=4", 4),
        ("tp=2,ep=2,etp=1", 2),
        ("tp=2,ep=2", 4),
        ("pp=2,ep=2", 4),
        ("tp=2,pp=2,cp=2", 8),
        ("tp=2,dp=3", 6),
    ],
)
def test_as_few_ranks_as_fit_are_started(text: str, ranks: int) -> None:
    assert ranks_needed(parse_plan(text)) == ranks


def test_one_rank_and_started_ranks_need_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    start_ranks(1)
    monkeypatch.setenv("RANK", "0")
    start_ranks(8)
