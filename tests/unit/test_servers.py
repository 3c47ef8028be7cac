"""Servers are started as configured, are told their keys in private, and come back when they die.

`sglang` is a stand-in here: an interpreter of rollout.sglang.python whose sglang.launch_server says nothing but 200.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from gspo_mm.config import Config, SGLangConfig, parse_config, save_config
from gspo_mm.serving import cpu
from gspo_mm.serving import host as module
from gspo_mm.serving.admin import is_fine
from gspo_mm.serving.host import ServerHost
from gspo_mm.serving.launch import check_installed, first_gpus, server_options, trainer_machines
from gspo_mm.serving.registry import beat, register, registered, servers_folder
from gspo_mm.serving.server import Server, ServerError
from tests.waiting import PATIENCE, eventually

# Notes what it was told in FOLDER/seen.TIME-PID.json. FOLDER/broken: how it fails at its start.
INTERPRETER = """#!{python} -S
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

if sys.argv[1] == "-c":
    sys.exit(0)
assert sys.argv[1:4] == ["-m", "sglang.launch_server", "--config"], sys.argv
lines = Path(sys.argv[4]).read_text().splitlines()
options = dict(line.split(": ", 1) for line in lines)
folder = Path(__file__).parent
seen = folder / f"seen.{{time.time_ns()}}-{{os.getpid()}}.json"  # several start at once
print("server log line")
sys.stdout.flush()
note = json.dumps(dict(pid=os.getpid(), argv=sys.argv, env=dict(os.environ)))
seen.with_suffix(".tmp").write_text(note)
seen.with_suffix(".tmp").rename(seen)
broken = folder / "broken"
if broken.exists():
    if broken.read_text() == "silent":
        time.sleep(1000)
    status, _, words = broken.read_text().partition(" ")
    if status == "2":
        print("usage: sglang serve [-h] --model-path MODEL_PATH\\n" + "                    [--option OPTION]\\n" * 500)
    print(words or "CUDA out of cheese")
    sys.exit(int(status) if words else 7)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

HTTPServer((options["host"], int(options["port"])), Handler).serve_forever()
"""


def new_config(folder: Path, **sections: Any) -> Config:
    """`rollout.sglang` and other sections' keys by keyword."""
    sglang = sections.pop("sglang", {})
    model = folder / "model"
    model.mkdir(exist_ok=True, parents=True)
    (model / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
    values: dict[str, Any] = {
        "run": {"name": folder.name, "dir": str(folder.parent)},
        "model": {"path": str(model)},
        "data": {"train": ["a.tar"]},
        "reward": {"file": "r.yaml"},
        "rollout": {"engine": "sglang", "sglang": sglang},
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return parse_config(values)


# --- options


def options(folder: Path, *, number: int = 0, on_gpus: bool = True, **sections: Any) -> dict[str, Any]:
    registration = Server(
        name=f"node-{number}",
        generation="g",
        state="up",
        url="http://10.0.0.1:4711",
        api_key="k",
        admin_key="a",
        first_gpu=2 * number,
    )
    return server_options(new_config(folder, **sections), registration, on_gpus=on_gpus)


def test_a_server_is_told_model_address_and_keys(tmp_path: Path) -> None:
    told = options(tmp_path)
    expected = {"host": "10.0.0.1", "port": 4711, "api-key": "k", "admin-api-key": "a", "dtype": "bfloat16"}
    assert told.items() >= expected.items()
    assert Path(told["model-path"]).is_absolute()


def test_options_that_a_family_needs_are_set(tmp_path: Path) -> None:
    assert "disable-shared-experts-fusion" not in options(tmp_path)
    glm = tmp_path / "glm"
    glm.mkdir()
    (glm / "config.json").write_text('{"model_type": "glm4v_moe"}')
    assert options(tmp_path, model={"path": str(glm)})["disable-shared-experts-fusion"] is True


def test_the_context_holds_the_longest_prompt_and_answer(tmp_path: Path) -> None:
    rollout = {"engine": "sglang", "sampling": {"max_new_tokens": 100}}
    assert options(tmp_path, data={"max_prompt_tokens": 1000}, rollout=rollout)["context-length"] == 1100
    assert options(tmp_path, sglang={"context_length": 5000})["context-length"] == 5000


def test_parallel_sizes_are_passed_on(tmp_path: Path) -> None:
    told = options(tmp_path, sglang={"tp": 8, "ep": 4, "dp": 2})
    assert (told["tp-size"], told["ep-size"], told["dp-size"]) == (8, 4, 2)
    assert told["enable-dp-attention"] is True
    assert not {"dp-size", "enable-dp-attention"} & set(options(tmp_path, sglang={"tp": 8}))


def test_servers_of_a_machine_have_gpus_of_their_own(tmp_path: Path) -> None:
    assert [options(tmp_path, number=n, sglang={"tp": 2})["base-gpu-id"] for n in range(4)] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("sglang", "training", "first"),
    [
        ({"servers": 4}, 4, [4, 5, 6, 7]),
        ({"servers": 2, "tp": 2}, 4, [4, 6]),
        ({"servers": 4, "tp": 2}, 0, [0, 2, 4, 6]),  # nobody trains there
        ({"servers": 4, "tp": 2, "colocate": True}, 8, [0, 2, 4, 6]),
    ],
)
def test_servers_stay_off_the_gpus_that_train_unless_they_share(
    sglang: dict[str, Any], training: int, first: list[int]
) -> None:
    assert list(first_gpus(SGLangConfig(**sglang), training=training, present=8)) == first


def test_too_few_gpus_are_told() -> None:
    with pytest.raises(
        ServerError, match=r"servers=4 of tp=2 need 8 GPUs beside the 4 that train, and .* has 8; .*colocate"
    ):
        first_gpus(SGLangConfig(servers=4, tp=2), training=4, present=8)


@pytest.mark.parametrize(
    ("start", "world", "machines"),
    [("here", 16, 1), ("beside", 16, 2), ("beside", 8, 1), ("elsewhere", 16, 1)],
)
def test_servers_are_started_on_every_machine_of_the_trainer(
    start: str, world: int, machines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (
        trainer_machines(new_config(tmp_path, sglang={"start": start}, rollout={"prompts_per_step": 64}))
        == machines
    )


def test_servers_draw_different_random_numbers(tmp_path: Path) -> None:
    seeds = {options(tmp_path, number=n)["random-seed"] for n in range(4)}
    seeds |= {options(tmp_path, number=n, run={"seed": 1})["random-seed"] for n in range(4)}
    assert len(seeds) == 8
    assert options(tmp_path)["random-seed"] == options(tmp_path)["random-seed"]


def test_limits_are_passed_on_where_they_are_set(
    tmp_path: Path, tiny_model: Path, tiny_sigmoid_model: Path
) -> None:
    names = {"max-total-tokens", "max-running-requests", "limit-mm-data-per-request", "mm-process-config"}
    assert not names & set(options(tmp_path))
    told = options(
        tmp_path,
        sglang={"max_tokens": 4096, "max_running": 32, "max_images": 2, "mem_fraction": 0.5},
    )
    assert told["max-total-tokens"] == 4096
    assert told["max-running-requests"] == 32
    assert json.loads(told["limit-mm-data-per-request"]) == {"image": 2}
    for model, counted in ((tiny_model, 1), (tiny_sigmoid_model, 2)):
        seen = options(tmp_path, model={"path": str(model)}, data={"min_pixels": 2000})
        size = {"shortest_edge": 2000 * counted, "longest_edge": 128 * 128 * counted}
        assert json.loads(seen["mm-process-config"]) == {"image": {"size": size}}
    assert told["mem-fraction-static"] == 0.5


def test_extra_arguments_have_the_last_word(tmp_path: Path) -> None:
    told = options(tmp_path, sglang={"extra_args": {"attention-backend": "fa3", "dtype": "half"}})
    assert (told["attention-backend"], told["dtype"]) == ("fa3", "half")


def test_without_gpus_torch_does_the_work(tmp_path: Path) -> None:
    told = options(tmp_path, on_gpus=False)
    assert told["device"] == "cpu"
    assert "base-gpu-id" not in told


def test_nothing_records_routed_experts(tmp_path: Path) -> None:
    assert not [name for name in options(tmp_path, sglang={"tp": 8, "ep": 8}) if "rout" in name]


# --- what has to be installed


def test_an_interpreter_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ServerError, match=r"rollout\.sglang\.python=/nowhere/python cannot be run: No such file"
    ):
        check_installed("/nowhere/python")


def test_an_interpreter_without_sglang_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(
        ServerError, match=r"rollout\.sglang\.python=.* has no sglang; pip install sglang there"
    ):
        check_installed(str(bare))


# --- servers that run

type StartHost = Callable[..., ServerHost]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return servers_folder(tmp_path / "run")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "interpreter"
    path.mkdir()
    path /= "python"
    path.write_text(INTERPRETER.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def start(folder: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartHost]:
    monkeypatch.setattr(module, "_POLL", 0.02)
    monkeypatch.setattr(cpu, "environment", lambda folder: {"FOR_CPU": "1"})
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    hosts: list[ServerHost] = []

    def start(policy: dict[str, Any] | None = None, **sglang: Any) -> ServerHost:
        sglang = {"python": str(python), "start_timeout": 60} | sglang
        config = new_config(folder.parent, sglang=sglang, policy=policy or {})
        hosts.append(ServerHost(config, folder, prefix="node"))
        hosts[-1].start()
        return hosts[-1]

    yield start
    for host in hosts:
        host.stop("the test is over")


def the_only(folder: Path, state: str) -> Server:
    """The registration once it says `state`."""

    def look() -> Server | None:
        found = registered(folder)
        return found[0] if found and found[0].state == state else None

    found = eventually(look)
    assert found
    return found


def seen(python: Path) -> list[dict[str, Any]]:
    """What each server that was started was told."""
    return [json.loads(path.read_text()) for path in sorted(python.parent.glob("seen.*.json"))]


def test_a_server_is_registered_when_it_answers(start: StartHost, folder: Path) -> None:
    start()
    server = the_only(folder, "up")
    assert server.name == "node-0"
    assert is_fine(server, "/ready", timeout=PATIENCE)


def serving(
    folder: Path, python: Path, tiny_model: Path, digit_shards: Path, tmp_path: Path
) -> subprocess.Popen[str]:
    """`gspo-mm serve` in a process."""
    sglang = {"python": str(python), "start": "elsewhere"}
    sections = {
        "model": {"path": str(tiny_model)},
        "data": {"train": [str(digit_shards / "train-*.tar")]},
        "reward": {"file": str(Path(__file__).parents[2] / "configs" / "rewards" / "digits.yaml")},
    }
    config = new_config(folder.parent, sglang=sglang, **sections)
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "gspo_mm.cli", "serve", str(tmp_path / "config.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_signal_after_the_trainers_last_word_makes_no_failure_of_serving(
    folder: Path, python: Path, tiny_model: Path, digit_shards: Path, tmp_path: Path
) -> None:
    """A cancelled trainer tells its servers, and Slurm stops them a moment later."""
    with serving(folder, python, tiny_model, digit_shards, tmp_path) as process:
        assert process.stdout
        the_only(folder, "up")
        beat(folder, ended="all steps are done")
        assert process.stdout.readline() == "the trainer's run is over: all steps are done\n"
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_a_signal_before_servers_are_started_is_told_to_the_trainer(
    folder: Path, python: Path, tiny_model: Path, digit_shards: Path, tmp_path: Path
) -> None:
    with serving(folder, python, tiny_model, digit_shards, tmp_path) as process:
        status = Path(f"/proc/{process.pid}/status")
        number = signal.SIGTERM
        eventually(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    assert output == "stopped by SIGTERM\n"
    assert the_only(folder, "stopped").reason == "stopped by SIGTERM"


def test_every_server_has_an_address_and_keys_of_its_own(start: StartHost, folder: Path) -> None:
    start(servers=3)
    eventually(lambda: [s.state for s in registered(folder)] == ["up"] * 3)
    servers = registered(folder)
    assert len({server.url for server in servers}) == 3
    assert len({key for server in servers for key in (server.api_key, server.admin_key)}) == 6
    assert min(len(server.api_key) for server in servers) >= 32


def test_keys_are_in_files_of_the_owner_and_nowhere_else(
    start: StartHost, folder: Path, python: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        start()
        server = the_only(folder, "up")
        os.kill(seen(python)[0]["pid"], signal.SIGKILL)  # a fault is logged as well
        eventually(lambda: len(seen(python)) == 2)
        server = the_only(folder, "up")
    keys = (server.api_key, server.admin_key)
    settings: Any = OmegaConf.load(folder / "node-0.yaml")
    assert (settings["api-key"], settings["admin-api-key"]) == keys
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(["node-0.json", "node-0.log", "node-0.yaml"], 0o600)
    told = seen(python)[-1]
    places = [caplog.text, (folder / "node-0.log").read_text(), str(told["argv"]), str(told["env"])]
    places += [str(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert caplog.text
    assert not [place for place in places for key in keys if key in place]


def test_a_server_does_not_take_itself_for_a_rank_of_the_trainer(
    start: StartHost, folder: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
    monkeypatch.setenv("KEPT", "1")
    for name in names:
        monkeypatch.setenv(name, "1")
    start()
    the_only(folder, "up")
    environment = seen(python)[0]["env"]
    assert environment["KEPT"] == environment["FOR_CPU"] == "1"
    assert not set(names) & set(environment)


@pytest.mark.parametrize(("said", "threads"), [(None, "4"), ("3", "3")])
def test_servers_without_gpus_share_the_cores(
    said: str | None, threads: str, start: StartHost, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    start(servers=2)
    eventually(lambda: len(seen(python)) == 2)
    assert {told["env"]["OMP_NUM_THREADS"] for told in seen(python)} == {threads}


@pytest.mark.parametrize(
    ("freeze", "size"), [([], "0"), (["vision"], "0"), (["vision", "projector", "router"], None)]
)
def test_image_features_are_kept_only_where_the_tower_stays_as_it_is(
    start: StartHost, folder: Path, python: Path, freeze: list[str], size: str | None
) -> None:
    start(policy={"freeze": freeze})
    the_only(folder, "up")
    assert seen(python)[0]["env"].get("SGLANG_VLM_CACHE_SIZE_MB") == size


def test_a_server_that_dies_is_started_anew_as_another_generation(
    start: StartHost, folder: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Server] = []

    def note(folder: Path, registration: Server) -> None:
        register(folder, registration)
        told.append(registration)

    monkeypatch.setattr(module, "register", note)
    host = start()
    the_only(folder, "up")
    os.kill(seen(python)[0]["pid"], signal.SIGKILL)
    eventually(lambda: len(told) == 3)
    first, down, second = told
    assert [server.state for server in told] == ["up", "down", "up"]
    assert "ended with status" in down.reason
    assert "server log line" in down.reason
    assert second.name == down.name == first.name
    assert second.generation != first.generation
    assert second.api_key != first.api_key
    assert is_fine(second, "/ready", timeout=PATIENCE)
    assert host.running()


def test_a_server_that_cannot_start_is_left_out_after_max_restarts(
    start: StartHost, folder: Path, python: Path
) -> None:
    (python.parent / "broken").write_text("ends")
    host = start(max_restarts=1)
    stopped = the_only(folder, "stopped")
    assert "ended with status 7 while starting" in stopped.reason
    assert "CUDA out of cheese" in stopped.reason
    assert str(folder / "node-0.log") in stopped.reason
    assert len(seen(python)) == 2
    eventually(lambda: not host.running())


@pytest.mark.parametrize(
    ("end", "tries"),
    [
        ("2 sglang serve: error: unrecognized arguments: --attentoin-backend fa3", 1),
        ("1 ValueError: Currently only triton is supported for deterministic inference", 1),
        ("7 the model cannot be loaded by process 4711", 2),  # may pass, and did not
        ("1 ERROR: [Errno 98] address already in use", 4),
        ("1 torch.OutOfMemoryError: CUDA out of memory", 4),
        ("9 CUDA out of memory", 4),
    ],
)
def test_a_server_that_can_only_fail_again_is_told_at_once(
    end: str, tries: int, start: StartHost, folder: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.01)
    (python.parent / "broken").write_text(end)
    host = start(max_restarts=3)
    stopped = the_only(folder, "stopped")
    status, words = end.split(" ", 1)
    assert f"ended with status {status} while starting" in stopped.reason
    assert words in stopped.reason
    assert "[--option" not in stopped.reason
    assert len(seen(python)) == tries
    eventually(lambda: not host.running())
    assert words in host.reasons()


def test_a_server_that_was_up_is_started_again_whatever_it_ends_with(
    start: StartHost, folder: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.01)
    start(max_restarts=3)
    the_only(folder, "up")
    (python.parent / "broken").write_text("2 error: the file system hiccups")
    os.kill(seen(python)[0]["pid"], signal.SIGKILL)
    the_only(folder, "stopped")
    assert len(seen(python)) == 1 + 3


def test_a_server_that_does_not_get_ready_is_ended(start: StartHost, folder: Path, python: Path) -> None:
    (python.parent / "broken").write_text("silent")
    start(max_restarts=0, start_timeout=4)  # in which even a busy machine starts an interpreter
    stopped = the_only(folder, "stopped")
    assert stopped.reason == "was not ready within rollout.sglang.start_timeout=4 s"
    assert not psutil.pid_exists(seen(python)[0]["pid"])


def test_stopping_ends_servers_and_tells_why(start: StartHost, folder: Path, python: Path) -> None:
    host = start(servers=2)
    eventually(lambda: [s.state for s in registered(folder)] == ["up"] * 2)
    host.stop("the run has ended")
    assert [(s.state, s.reason) for s in registered(folder)] == [("stopped", "the run has ended")] * 2
    assert not host.running()
    assert len(seen(python)) == 2
    assert not [told["pid"] for told in seen(python) if psutil.pid_exists(told["pid"])]


def test_a_server_that_is_starting_can_be_stopped(start: StartHost, folder: Path, python: Path) -> None:
    (python.parent / "broken").write_text("silent")
    host = start()
    eventually(lambda: seen(python))
    host.stop("changed our mind")
    assert the_only(folder, "stopped").reason == "changed our mind"
    assert not psutil.pid_exists(seen(python)[0]["pid"])


def test_a_keeper_that_fails_says_so(start: StartHost, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> dict[str, str]:
        raise OSError("no compiler")

    monkeypatch.setattr(cpu, "environment", fail)
    start()
    assert "no compiler" in the_only(folder, "stopped").reason
