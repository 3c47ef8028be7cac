"""The doctor says what is here, warns of the wrong apex, and fails only for what would stop a run."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from gspo_mm.commands import doctor
from gspo_mm.commands.doctor import Check, diagnose


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def server() -> Iterator[str]:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_the_installed_packages_are_found() -> None:
    import torch

    checks = diagnose()
    assert named(checks, "torch").found == torch.__version__.partition("+")[0]
    assert all(named(checks, name).status == "ok" for name in ("python", "megatron-core", "transformers"))
    assert not [check for check in checks if check.status == "error"]


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "megatron-core" else found(name))
    assert named(diagnose(), "megatron-core").status == "error"
    assert doctor.doctor() == 1


def test_pypis_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"apex"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: object() if name in modules else None)
    impostor = doctor._apex()
    assert impostor.status == "warning"
    assert "pip uninstall apex" in impostor.hint
    modules |= {"amp_C", "apex.optimizers"}
    assert doctor._apex().status == "ok"


def test_a_server_that_answers_is_reachable_and_one_that_does_not_is_an_error(server: str) -> None:
    assert named(diagnose(server), server).status == "ok"
    assert named(diagnose(f"{server}/x"), f"{server}/x").found == "HTTP 404"
    refused = "http://127.0.0.1:9"
    assert named(diagnose(refused), refused).status == "error"
    assert named(diagnose("nonsense"), "nonsense").status == "error"
    assert doctor.doctor(refused) == 1
    assert doctor.doctor(server) == 0
