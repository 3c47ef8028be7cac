"""The embedded engine is transformers' own model: same greedy tokens as `generate()`, same log-probs as a forward."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.families.folder import read_hf
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.types import Completion, EncodedPrompt, Finish, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8)
SAMPLED = SamplingParams(temperature=0.8, max_new_tokens=8)


@pytest.fixture(
    scope="module", params=["tiny_model", "tiny_hybrid_model", "tiny_windows_model", "tiny_sigmoid_model"]
)
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """One whose keys and values grow, one with layers that hold a memory of one size, one without norms of queries and keys,
    one whose routers have a bias.
    """
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def processor(tiny_model: Path, digit_shards: Path) -> Processor:
    return Processor(str(tiny_model), DataConfig(train=[f"{digit_shards}/train-*.tar"]))


@pytest.fixture(scope="module")
def prompts(processor: Processor, digit_shards: Path) -> list[EncodedPrompt]:
    """Five image prompts of different lengths and one without an image."""
    data = DataConfig(train=[f"{digit_shards}/train-*.tar"])
    found = PromptSource(data, processor, seed=0, split="train").take(5)
    text = replace(
        found[0].prompt,
        images=(),
        messages=({"role": "user", "content": "Which digit is the largest of them all?"},),
    )
    return [*found[:2], processor.encode(text), *found[2:]]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def engine(tiny_model: Path, processor: Processor) -> EmbeddedEngine:
    engine = EmbeddedEngine(str(tiny_model), processor, dtype=torch.float32, max_batch=64)
    engine.load_weights(read_hf(tiny_model, "auto"), version=3)
    return engine


def generate(
    engine: EmbeddedEngine, prompts: list[EncodedPrompt], sampling: SamplingParams, group: int, seed: int = 0
):
    return engine.generate(prompts, group_size=group, sampling=sampling, seed=seed)


def reference_logprobs(
    model: torch.nn.Module, prompt: EncodedPrompt, completion: Completion, temperature: float
) -> torch.Tensor:
    ids = torch.tensor([prompt.token_ids])
    mm_types = (ids == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, mm_types, image_grid_thw=prompt.image_grid_thw)
    embeds_only = torch.tensor([prompt.token_ids + completion.token_ids])
    start = int(positions.max()) + 1
    tail = torch.arange(start, start + len(completion.token_ids)).expand(3, 1, -1)
    with torch.no_grad():
        logits = model(
            input_ids=embeds_only,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            position_ids=torch.cat([positions, tail], dim=2),
        ).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    rows = torch.arange(ids.shape[1] - 1, embeds_only.shape[1] - 1)
    return logprobs[rows, torch.tensor(completion.token_ids)]


def test_greedy_tokens_equal_those_of_transformers_generate(
    engine: EmbeddedEngine, prompts: list[EncodedPrompt], reference: torch.nn.Module, processor: Processor
) -> None:
    for prompt, (completion,) in zip(prompts, generate(engine, prompts, GREEDY, 1), strict=True):
        ids = torch.tensor([prompt.token_ids])
        seen = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        out = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == reference.config.image_token_id).int(),
            **(seen if prompt.prompt.images else {}),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=list(processor.stop_token_ids),
        )
        assert completion.token_ids == tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_log_probs_equal_a_full_forward_of_transformers(
    engine: EmbeddedEngine, prompts: list[EncodedPrompt], reference: torch.nn.Module, temperature: float
) -> None:
    sampling = SamplingParams(temperature=temperature, max_new_tokens=8)
    worst = 0.0
    for prompt, answers in zip(prompts, generate(engine, prompts, sampling, 2, seed=4), strict=True):
        for completion in answers:
            if reference.config.image_token_id in completion.token_ids:
                continue  # transformers' forward would look for an image there
            expected = reference_logprobs(reference, prompt, completion, temperature)
            worst = max(worst, (expected - torch.tensor(completion.logprobs)).abs().max().item())
    assert 0 < worst < 2e-5


def test_answers_do_not_depend_on_how_they_are_batched(
    engine: EmbeddedEngine, prompts: list[EncodedPrompt]
) -> None:
    together = generate(engine, prompts, SAMPLED, 4)
    engine._max_batch = 4
    apart = generate(engine, prompts, SAMPLED, 4)
    tokens = [[c.token_ids for c in group] for group in together]
    assert tokens == [[c.token_ids for c in group] for group in apart]


def test_the_seed_decides_the_answers_and_answers_of_a_group_differ(
    engine: EmbeddedEngine, prompts: list[EncodedPrompt]
) -> None:
    once, again, other = (generate(engine, prompts, SAMPLED, 4, seed=s) for s in (1, 1, 2))
    assert once == again
    assert once != other
    assert len({c.token_ids for c in once[0]}) > 1


def test_an_answer_ends_at_the_stop_token_and_says_so(
    engine: EmbeddedEngine, prompts: list[EncodedPrompt], processor: Processor
) -> None:
    (first,) = generate(engine, prompts[:1], GREEDY, 1)[0]
    processor_stops = processor.stop_token_ids
    try:
        processor.stop_token_ids = (first.token_ids[2],)
        (stopped,) = generate(engine, prompts[:1], GREEDY, 1)[0]
    finally:
        processor.stop_token_ids = processor_stops
    cut = first.token_ids.index(first.token_ids[2]) + 1
    assert stopped.token_ids == first.token_ids[:cut]
    assert stopped.finish is Finish.STOP
    assert first.finish is Finish.LENGTH
    assert first.versions == (3,) * 8


def test_the_image_decides_the_answer(engine: EmbeddedEngine, prompts: list[EncodedPrompt]) -> None:
    seen = prompts[0]
    assert seen.pixel_values is not None
    blank = replace(seen, pixel_values=torch.zeros_like(seen.pixel_values))
    (a,), (b,) = generate(engine, [seen, blank], GREEDY, 1)
    assert a.logprobs != b.logprobs


def test_a_sync_that_forgets_the_vision_tower_is_refused(engine: EmbeddedEngine, tiny_model: Path) -> None:
    blind = [(name, tensor) for name, tensor in read_hf(tiny_model, "auto") if "visual" not in name]
    with pytest.raises(ValueError, match=r"left \d+ tensors stale, first .*visual"):
        engine.load_weights(blind, version=4)
    assert engine.version == 3


def test_a_sync_of_an_unknown_tensor_is_refused(engine: EmbeddedEngine) -> None:
    with pytest.raises(ValueError, match=r"sent model\.extra"):
        engine.load_weights([("model.extra", torch.zeros(1))], version=4)
