"""What tools/bench/ablation.py says is what happened: replayed routes, spreads of ratios, accuracies at equal cost, collapses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from tests.tiny_vl import save, tiny_vl
from tools.bench.ablate.arms import ARMS, FULL, SHORT
from tools.bench.ablate.plots import draw
from tools.bench.ablate.ratios import Ratios
from tools.bench.ablate.replay import Replay, cache_of
from tools.bench.ablate.summary import accuracy_at, collapsed
from tools.check_parity import random_batch, reference_logprobs


def choosing(model: Any, chosen: dict[int, list[torch.Tensor]], *, replay: bool) -> list[Any]:
    """Hooks on transformers' routers that note the experts of each call, or make it use those that were noted."""

    def hook(layer: int) -> Any:
        def note(_: Any, __: Any, out: tuple[torch.Tensor, ...]) -> Any:
            if not replay:
                chosen.setdefault(layer, []).append(out[2])
                return out
            logits, _, _ = out
            experts = chosen[layer].pop(0)
            probs = logits.softmax(-1).gather(1, experts)
            return logits, probs / probs.sum(-1, keepdim=True), experts

        return note

    layers = model.model.language_model.layers
    return [layer.mlp.gate.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]


def test_replayed_updates_compute_what_transformers_does_with_the_old_experts(tmp_path: Path) -> None:
    old, new = tiny_vl(num_hidden_layers=3, seed=1), tiny_vl(num_hidden_layers=3, seed=2)
    folders = [save(model, tmp_path / name) for name, model in (("old", old), ("new", new))]
    config = PolicyConfig.model_validate(
        {"dtype": "float32", "megatron": {"moe_enable_routing_replay": True}}
    )
    policy = Policy.from_hf(str(folders[0]), config, seed=0, total_steps=1)
    replay, batch = Replay(policy), random_batch(old, images=0)
    with replay.recording():
        policy.logprobs([batch])
    policy.load_hf(read_hf(folders[1]))
    (free,) = policy.logprobs([batch])
    seen: list[torch.Tensor] = []
    with replay.replaying():
        policy.backward(
            [batch], lambda _, logprobs, __: (seen.append(logprobs.detach()) or logprobs.sum(), {})
        )
    chosen: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        hooks = choosing(old, chosen, replay=False)
        reference_logprobs(old, batch)
        for hook in hooks:
            hook.remove()
        choosing(new, chosen, replay=True)
        expected = reference_logprobs(new, batch)
    assert (seen[0] - expected).abs().max() < 1e-5
    assert (seen[0] - free).abs().max() > 1e-3
    assert replay.found()["bytes"] == 3 * 2 * batch.num_tokens  # a byte for each layer and choice


def test_a_cache_is_of_the_published_sizes() -> None:
    found = cache_of("Qwen3-VL-30B-A3B", tokens=1000)
    assert found["uint8"] == 48 * 8 * 1000
    assert found["int32"] == 4 * found["uint8"]


def test_spreads_are_those_of_the_log_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    ratios = Ratios()
    ratios.add(torch.zeros(4), torch.tensor([0, 4]))  # the policy is still the old one
    for half in answers.split(25):
        ratios.add(half.flatten(), torch.arange(0, 151, 6))
    (found,) = ratios.by_length()
    assert (found["length"], found["answers"]) == (6, 50)
    for name, values in (("sum", answers.sum(1)), ("mean", answers.mean(1)), ("token", answers)):
        assert found[name] == pytest.approx(float(values.std(correction=0)))


def line(step: int, accuracy: float | None = None) -> dict[str, float]:
    evaluated = {} if accuracy is None else {"eval/accuracy": accuracy}
    return {"step": step, "seconds": 2.0 * (step > 0), **evaluated}


def test_accuracy_at_a_cost_lies_between_the_evaluations_around_it() -> None:
    lines = [line(0, 0.2), line(1), line(2, 0.4), line(3), line(4, 0.3)]
    assert accuracy_at(lines, "seconds", 2.0) == pytest.approx(0.3)
    assert accuracy_at(lines, "seconds", 4.0) == pytest.approx(0.4)
    assert accuracy_at(lines, "seconds", 7.0) == pytest.approx(0.325)
    assert accuracy_at(lines, "seconds", 8.0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("accuracies", "fault", "expected"),
    [
        ((0.3, 0.5, 0.4), None, False),
        ((0.3, 0.4, 0.28), None, False),  # below its start by less than noise
        ((0.3, 0.4, 0.2), None, True),
        ((0.1, 0.8, 0.3), None, True),  # below half of its best
        ((0.3, 0.5), "loss is nan", True),
    ],
)
def test_a_collapse_is_more_than_noise(
    accuracies: tuple[float, ...], fault: str | None, expected: bool
) -> None:
    lines = [line(step, accuracy) for step, accuracy in enumerate(accuracies)]
    assert collapsed(lines, fault, eval_prompts=300) is expected


def test_every_arm_has_a_run_with_every_seed() -> None:
    first = [run for run in SHORT.runs() if run.setting == (8, 0)]
    assert len(first) == len(set(first)) == SHORT.seeds * (len(ARMS) - 1) + 1
    assert {run.setting for run in FULL.runs()} == {(e, s) for e in (8, 64) for s in (0, 1, 4)}


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    ratios = [{"length": 4, "answers": 50, "sum": 0.2, "token": 0.1, "mean": 0.05}]
    lines = [
        {"step": step, "eval/accuracy": 0.3 + step / 10, "reward/mean": 0.4, "routing/agree": 0.9}
        for step in (1.0, 2.0, 3.0)
    ]
    found = {"lines": lines, "ratios": ratios, "fault": None, "replay": None}
    draw({run: found for run in SHORT.runs() if run.seed < 2}, tmp_path)
    drawn = {file.name: file.read_bytes()[:4] for file in tmp_path.iterdir()}
    assert drawn == dict.fromkeys(["learning.png", "ratios.png", "flips.png", "staleness.png"], b"\x89PNG")
