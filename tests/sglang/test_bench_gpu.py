"""Stage d of tools/bench/gpu.py, with the server of these tests; the other stages: tests/e2e. A few seconds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from tests.sglang.conftest import MakeConfig
from tools.bench.card.results import Job, Report, Results
from tools.bench.card.servers import push


@pytest.mark.parametrize("mode", ["tensor", "distributed"])
def test_pushes_are_timed_and_the_server_then_answers_as_the_policy(
    mode: str, make_config: MakeConfig, engine: SGLangEngine, processor: Processor, tmp_path: Path
) -> None:
    config = make_config(sync={"mode": mode}, rollout={"sglang": {"colocate": True}})
    policy = Policy.from_hf(config.model.path, config.policy, seed=5, total_steps=1)
    job = Job(stage="d", part=f"push-{mode}", dry=True, card="CPU", versions={}, settings={})
    results, out = Results(tmp_path), io.StringIO()
    push(Report(job, results, out), config, policy, engine, processor, pushes=1, max_gap=1e-4)
    numbers = {name: value for line in results.lines() for name, value in line["numbers"].items()}
    speeds = {"push_gb_per_s", "verified_push_gb_per_s", "copy_gb_per_s", "weights_gb"}
    assert all(numbers[name] > 0 for name in speeds)
    assert {"given_back_gib", "waking_push_s", "push_of_copy target"} <= numbers.keys()
    assert numbers["logprob_gap"].keys() == {"text", "after an image", "response"}
    assert all(line.startswith(f"dry d push-{mode}  ") for line in out.getvalue().splitlines())
