"""A gap between engine and policy is put down to two experts that a router scores almost alike, and to nothing else."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspo_mm.batch import pack
from gspo_mm.config import PolicyConfig
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.near_ties import NearTies
from gspo_mm.types import TrainSequence
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import reference_logprobs

LAST, PROMPT, LENGTH = 3, 4, 12  # layer with the tie; tokens of a prompt, and of a sequence


class OnlyText:
    """What packing needs where nothing has a picture."""

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        return torch.arange(len(token_ids)).expand(3, -1)


TEXT: Any = OnlyText()


def sequences() -> list[TrainSequence]:
    drawn = np.random.default_rng(0).integers(10, 200, (4, LENGTH)).astype(np.int32)
    return [
        TrainSequence(name=f"s{i}", token_ids=ids, trained=np.arange(LENGTH) >= PROMPT, images=())
        for i, ids in enumerate(drawn)
    ]


def answered_by(model: Any, members: list[TrainSequence]) -> list[TrainSequence]:
    """With the log-probs of transformers' model."""
    logprobs = reference_logprobs(model, pack(members, TEXT)).detach().float().numpy()
    parts = np.split(logprobs, len(members))
    return [replace(s, rollout_logprobs=own) for s, own in zip(members, parts, strict=True)]


def gate_of(model: Any) -> torch.nn.Parameter:
    return model.model.language_model.layers[LAST].mlp.gate.weight


def tied(model: Any, member: TrainSequence, place: int) -> tuple[Any, Any]:
    """Two models, apart by 2e-7 in one row of a router: each gives the token at `place` another second expert."""
    scores: list[torch.Tensor] = []
    gate = model.model.language_model.layers[LAST].mlp.gate
    hook = gate.register_forward_hook(lambda gate, given, _: scores.append(given[0] @ gate.weight.T))
    model(input_ids=torch.tensor(member.token_ids[None].astype(np.int64)))
    hook.remove()
    _, second, third, *_ = scores[0].view(LENGTH, -1)[place].argsort(descending=True).tolist()
    pair = (copy.deepcopy(model), copy.deepcopy(model))
    with torch.no_grad():
        for one, factor in zip(pair, (1 - 1e-6, 1 + 1e-6), strict=True):
            gate_of(one)[third] = gate_of(one)[second] * factor
    return pair


def look(
    model: Any, members: list[TrainSequence], folder: Path
) -> tuple[NearTies, dict[str, float], torch.Tensor]:
    """Of the policy with the model's weights, on members with log-probs of an engine; with all differences."""
    policy = Policy.from_hf(str(save(model, folder)), PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    ties, batch = NearTies(policy, TEXT), pack(members, TEXT)
    (logprobs,) = policy.logprobs([batch])
    metrics = ties.look([members], [batch], [logprobs])
    assert batch.rollout_logprobs is not None
    return ties, metrics, (logprobs - batch.rollout_logprobs).abs().view(len(members), -1)


@pytest.fixture
def model() -> Any:
    return tiny_vl(num_hidden_layers=LAST + 1, mlp_only_layers=[1]).eval()


def test_a_tie_that_engine_and_policy_decide_otherwise_is_found(model: Any, tmp_path: Path) -> None:
    members, place = sequences(), 6
    ours, theirs = tied(model, members[1], place)
    ties, metrics, gap = look(ours, answered_by(theirs, members), tmp_path / "hf")
    assert gap[1, place + 1 - PROMPT] > 1e-3
    assert gap.median() < 1e-5
    assert metrics["near_ties/explained"] == metrics["near_ties/odd"] >= 1
    (said,) = [said for said in ties.said if "differ at s1," in said]
    assert f"a near tie of two experts in layer {LAST} can explain it" in said


def test_a_gap_without_a_tie_is_not_explained(model: Any, tmp_path: Path) -> None:
    members = answered_by(model, sequences())
    assert members[2].rollout_logprobs is not None
    members[2].rollout_logprobs[3] += 0.05
    ties, metrics, _ = look(model, members, tmp_path / "hf")
    assert metrics == {"near_ties/odd": 1.0, "near_ties/explained": 0.0}
    (said,) = ties.said
    assert said.startswith(
        f"engine and policy differ at s2, token {PROMPT + 3}, 0.05 nats: no near tie of experts can explain it"
    )


def test_where_nothing_is_odd_nothing_is_computed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = answered_by(model, sequences())
    monkeypatch.setattr(NearTies, "_explain", lambda *_: pytest.fail("looked at what is usual"))
    ties, metrics, gap = look(model, members, tmp_path / "hf")
    assert (ties.said, metrics) == ([], {})
    assert gap.max() < 1e-5
