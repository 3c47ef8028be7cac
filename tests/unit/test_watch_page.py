"""`gspo-mm watch`: the report of a run that goes on, to this machine's browsers alone."""

import threading
from pathlib import Path

import httpx
import pytest

from gspo_mm.commands.watch import server_of
from gspo_mm.config import ObserveConfig
from gspo_mm.observe.metrics import MetricsWriter
from gspo_mm.types import GspoError


def test_the_page_is_drawn_again_and_tells_when_there_is_more(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        metrics.write(1, {"loss": 1.0, "time/step": 1.0})
        with server_of(tmp_path, 0) as server:
            threading.Thread(target=server.serve_forever).start()
            address = f"http://127.0.0.1:{server.server_port}"
            before = httpx.get(f"{address}/reached").text
            assert "few to judge by" in httpx.get(address).text
            assert httpx.get(f"{address}/reached").text == before
            for step in (2, 3, 4):
                metrics.write(step, {"reward/std": 0.0, "reward/mean": 0.0, "time/step": 1.0})
            assert httpx.get(f"{address}/reached").text != before
            assert "constant_reward" in httpx.get(address).text
            codes = [
                httpx.get(f"{address}/{path}").status_code for path in ("metrics.jsonl", "../etc/passwd")
            ]
            assert [*codes, httpx.get(address, headers={"Host": "example.org"}).status_code] == [404] * 3
            with pytest.raises(GspoError, match=r"--port .* cannot be used"):
                server_of(tmp_path, server.server_port)
            server.shutdown()


def test_a_folder_without_a_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GspoError, match="is no run folder"):
        server_of(tmp_path, 0)
