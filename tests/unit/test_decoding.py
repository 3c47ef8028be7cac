"""Decoding is transformers' own model, whatever is recorded, replaced or written in place. Costs 20 s."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNormGated

from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.families.folder import read_hf
from gspo_mm.rollout.cache import Room, use_torch_norms
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.rollout.traced import Decoder
from gspo_mm.types import Completion, EncodedPrompt, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module", params=["tiny_model", "tiny_hybrid_model"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def processor(tiny_model: Path, digit_shards: Path) -> Processor:
    return Processor(str(tiny_model), DataConfig(train=[f"{digit_shards}/train-*.tar"]))


@pytest.fixture(scope="module")
def prompts(processor: Processor, digit_shards: Path) -> list[EncodedPrompt]:
    data = DataConfig(train=[f"{digit_shards}/train-*.tar"])
    return PromptSource(data, processor, seed=0, split="train").take(3)


def engine_of(tiny_model: Path, processor: Processor, *, records: bool) -> EmbeddedEngine:
    engine = EmbeddedEngine(str(tiny_model), processor, dtype=torch.float32, max_batch=64)
    engine.load_weights(read_hf(tiny_model, "auto"), version=0)
    assert engine._decode is not None
    engine._decode._records = records
    return engine


def flat(engine: EmbeddedEngine, prompts: list[EncodedPrompt], seed: int = 0) -> list[Completion]:
    groups = engine.generate(prompts, group_size=8, sampling=SAMPLING, seed=seed)
    return [completion for group in groups for completion in group]


def test_recorded_steps_are_the_models_while_rows_leave_and_after_new_weights(
    tiny_model: Path, processor: Processor, prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a tenth of the vocabulary ends an answer, so that rows leave at many steps
    monkeypatch.setattr(processor, "stop_token_ids", tuple(range(0, 400, 10)))
    recorded, written = (engine_of(tiny_model, processor, records=r) for r in (True, False))
    for version in (1, 2):
        ours, theirs = flat(recorded, prompts), flat(written, prompts)
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        assert len({len(c.token_ids) for c in ours}) > 5
        gaps = [
            abs(a - b)
            for o, t in zip(ours, theirs, strict=True)
            for a, b in zip(o.logprobs, t.logprobs, strict=True)
        ]
        assert max(gaps) < 1e-6
        for engine in (recorded, written):
            assert engine._decode is not None
            changed = [(name, 1.1 * tensor) for name, tensor in read_hf(tiny_model, "auto")]
            engine.load_weights(changed, version=version)
    assert recorded._decode is not None
    assert recorded._decode._records
    assert len(recorded._decode._agreed) > 5


class ForgetsLengths(torch.nn.Module):
    """A model whose number of cached tokens becomes a constant when it is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> tuple[torch.Tensor]:
        state = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(state, state, 0)
        return (input_ids[..., None] + torch.ones(1, 1, 4) * int(keys.shape[2]),)


def test_a_recording_that_does_not_fit_another_length_is_not_used() -> None:
    cache = Cache(layers=[])
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.update(torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))
    cache.layers.append(Room(layer, torch.arange(2), tokens=5))
    decode = Decoder(ForgetsLengths())
    ids = torch.zeros(2, 1, dtype=torch.int64)
    seen = [decode(ids, ids, torch.zeros(2, 1, 1, n), cache)[0, 0].item() for n in (4, 5, 6)]
    assert seen == [4.0, 5.0, 6.0]
    assert not decode._records


class Doubled(LlamaRMSNorm):
    """A norm that computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize(
    ("kind", "replaced"),
    [(LlamaRMSNorm, True), (GemmaRMSNorm, True), (Doubled, False), (Qwen3_5MoeRMSNormGated, False)],
)
def test_only_norms_that_compute_the_same_are_replaced(kind: Any, replaced: bool) -> None:
    norm = kind(16)
    use_torch_norms(norm)
    assert ("forward" in vars(norm)) is replaced
    with torch.no_grad():
        norm.weight.copy_(torch.arange(16.0))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    gate = [x] if kind is Qwen3_5MoeRMSNormGated else []
    torch.testing.assert_close(norm(x, *gate), kind.forward(norm, x, *gate))
