"""Unusable samples are counted by reason, named in the log and in a file, and stop a run that has too many."""

import json
from pathlib import Path

import pytest

from gspo_mm.data.faults import BadSample, LeftOut
from gspo_mm.data.skips import MIN_READ, SkipLog
from gspo_mm.types import DataError


def test_one_early_fault_does_not_stop_a_run_but_too_many_do() -> None:
    log = SkipLog(0.05)
    log.bad("a", BadSample("corrupt image"))
    for _ in range(MIN_READ - 6):
        log.good()
    for key in "bcde":
        log.bad(key, BadSample("corrupt image"))  # 5 of 99
    with pytest.raises(
        DataError, match=r"6 of 100 samples.*5 corrupt image, 1 wrong json.*max_bad_fraction=0.05"
    ):
        log.bad("f", BadSample("wrong json"))


def test_skips_are_named_in_the_log_and_survive_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    log = SkipLog(0.5)
    log.bad("a.tar/3", BadSample("corrupt image", "png is empty"))
    assert "a.tar/3: corrupt image: png is empty" in caplog.text
    again = SkipLog(0.5)
    again.load(json.loads(json.dumps(log.state())))
    assert (again.skipped, again.read) == (1, 1)


def test_the_end_of_the_data_is_judged_however_short_it_is() -> None:
    log = SkipLog(0.1)
    log.bad("a", BadSample("corrupt image"))
    with pytest.raises(DataError, match="1 of 1"):
        log.judge()


def test_what_the_config_leaves_out_is_counted_but_not_held_against_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SkipLog(0.0, tmp_path / "q.jsonl")
    for _ in range(2 * MIN_READ):
        log.bad("a", LeftOut("image size"))
    log.judge()
    assert (log.skipped, log.left_out) == (0, {"image size": 2 * MIN_READ})
    assert not caplog.text
    assert not (tmp_path / "q.jsonl").exists()
    again = SkipLog(0.0)
    again.load(json.loads(json.dumps(log.state())))
    assert again.left_out == log.left_out


def listed(path: Path) -> list[tuple[str, str]]:
    return [(line["sample"], line["reason"]) for line in map(json.loads, path.read_text().splitlines())]


def test_the_quarantine_file_lists_each_unusable_sample_once(tmp_path: Path) -> None:
    log = SkipLog(1.0, tmp_path / "q.jsonl")
    for _ in range(3):  # epochs
        log.bad("a", BadSample("corrupt image", "png is empty"))
        log.bad('b"\n', BadSample("wrong json", "{\udcff"))
    assert listed(tmp_path / "q.jsonl") == [("a", "corrupt image"), ('b"\n', "wrong json")]


def test_a_resumed_run_lists_what_it_would_have_listed(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    log = SkipLog(1.0, path)
    log.bad("a", BadSample("corrupt image"))
    state = log.state()
    log.good()
    log.bad("b", BadSample("corrupt image"))
    with path.open("a") as file:
        file.write('{"sample": "c", "rea')  # killed while it wrote
    again = SkipLog(1.0, path)
    again.load(state)
    again.rewind()
    assert listed(path) == [("a", "corrupt image")]
    again.bad("b", BadSample("too long"))
    again.bad("a", BadSample("corrupt image"))
    assert listed(path) == [("a", "corrupt image"), ("b", "too long")]


def test_a_run_that_starts_anew_starts_its_list_anew(tmp_path: Path) -> None:
    SkipLog(1.0, tmp_path / "q.jsonl").bad("a", BadSample("corrupt image"))
    log = SkipLog(1.0, tmp_path / "q.jsonl")
    log.bad("b", BadSample("corrupt image"))
    assert listed(tmp_path / "q.jsonl") == [("b", "corrupt image")]


def test_the_message_that_stops_a_run_names_the_file(tmp_path: Path) -> None:
    log = SkipLog(0.0, tmp_path / "q.jsonl")
    log.bad("a", BadSample("corrupt image"))
    with pytest.raises(DataError, match=r"q\.jsonl names each sample"):
        log.judge()
