"""The rollout engine for laptops and tests: transformers' own model in this process, on the synced weights.

It calls the model's forward itself instead of `generate()`, for three reasons: each prompt (and its image) is
prefilled once and its key/value cache shared out to the G answers; finished answers leave the batch; and the
log-prob of every sampled token is taken from the very logits it was drawn from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import torch

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.environment.conversation import Conversation, Conversations, conversations_of
from gspo_mm.families.table import family_of
from gspo_mm.hf.tensors import held
from gspo_mm.rollout.cache import cache_argument, make_room, share_keys_in_decoding, use_torch_norms
from gspo_mm.rollout.engine import TokenSide
from gspo_mm.rollout.traced import Decoder
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.runtime.watchdog import beat
from gspo_mm.types import Completion, EncodedPrompt, Finish, SamplingParams

# legend: Q prompts of a chunk, B = Q*G rows being decoded, P padded prompt length, V vocabulary


class EmbeddedOpening:
    """Opening of the embedded engine: nothing is to be done ahead."""

    def __init__(self, config: Config, stop: StopRequest, *, main: bool) -> None:
        self._config, self._main = config, main

    def open(self, processor: Processor) -> EmbeddedEngine | None:
        if not self._main:
            return None
        dtype = getattr(torch, self._config.policy.dtype)
        max_batch = self._config.rollout.max_batch
        return EmbeddedEngine(
            self._config.model.path,
            processor,
            dtype=dtype,
            max_batch=max_batch,
            conversations=conversations_of(self._config.rollout, processor),
        )

    def close(self, reason: str) -> None:
        """Nothing: the engine's memory goes with it."""


class EmbeddedEngine:
    """RolloutEngine over transformers' model of a Hugging Face folder.

    The weights are whatever `load_weights` brings; until its first call they are random and `version` is -1.
    """

    def __init__(
        self,
        model_path: str,
        processor: TokenSide,
        *,
        dtype: torch.dtype,
        max_batch: int,
        conversations: Conversations | None = None,
    ) -> None:
        self._family = family_of(model_path)
        self._hf = config = self._family.load_config(model_path)
        self._axes = len(self._family.positions(config, torch.empty(0, dtype=torch.int64), None))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(), device:
            model: Any = self._family.auto_class(config).from_config(config, dtype=dtype)
        self._model: Any = model.eval().requires_grad_(False)
        share_keys_in_decoding(self._model)
        use_torch_norms(self._model)
        self._decode: Any = Decoder(self._model)
        self._cache = cache_argument(self._model)
        self._tensors = held(model)
        self._tied = set(model.state_dict()) - set(self._tensors)  # second names of shared tensors
        self._processor = processor
        self._device = device
        self._max_batch = max_batch
        self._conversations = conversations
        self._version = -1

    @property
    def version(self) -> int:
        return self._version

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Replace all weights by HF-named tensors (transformers' in-memory layout). Raises ValueError on a gap."""
        missing = set(self._tensors)
        for name, tensor in tensors:
            if name not in self._tensors:
                if name in self._tied:
                    continue
                raise ValueError(f"weight sync sent {name}, which the rollout model does not have")
            self._tensors[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weight sync left {len(missing)} tensors stale, first {min(missing)}")
        self._version = version

    def generate(
        self, prompts: list[EncodedPrompt], *, group_size: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """See RolloutEngine. Rows are independent of their chunk: each has its own column of random numbers."""
        uniforms = _uniforms(seed, sampling, len(prompts) * group_size)
        limits = [sampling.max_new_tokens] * len(prompts) * group_size
        answers = self._sample(prompts, group_size, sampling, uniforms, limits)
        if self._conversations:
            asked = [prompt for prompt in prompts for _ in range(group_size)]
            answers = self._lead(self._conversations, asked, answers, sampling, seed)
        return [answers[i : i + group_size] for i in range(0, len(answers), group_size)]

    def close(self, reason: str = "") -> None:
        self._tensors, self._model, self._decode = {}, None, None
        if self._conversations:
            self._conversations.close()

    def _lead(
        self,
        conversations: Conversations,
        prompts: Sequence[EncodedPrompt],
        answers: list[Completion],
        sampling: SamplingParams,
        seed: int,
    ) -> list[Completion]:
        """The answers, one to each of `prompts`, with all of their turns: those that go on do so together."""
        answers = [*answers]
        under_way = {i: Conversation.of(*each) for i, each in enumerate(zip(prompts, answers, strict=True))}

        async def follow() -> list[Completion | Conversation]:
            return await asyncio.gather(*map(conversations.follow, under_way.values()))

        for turn in count(1):
            going: dict[int, Conversation] = {}
            for row, found in zip(under_way, asyncio.run(follow()), strict=True):
                if isinstance(found, Conversation):
                    going[row] = found
                else:
                    answers[row] = found
            if not going:
                break
            uniforms = _uniforms(derive_seed(seed, "turn", turn), sampling, len(prompts))
            reads, limits = [led.read for led in going.values()], [led.most for led in going.values()]
            sampled = self._sample(reads, 1, sampling, uniforms[:, [*going]], limits)
            under_way = {
                row: led.with_turn(new) for (row, led), new in zip(going.items(), sampled, strict=True)
            }
        return answers

    def _sample(
        self,
        prompts: Sequence[EncodedPrompt],
        group_size: int,
        sampling: SamplingParams,
        uniforms: torch.Tensor,
        limits: Sequence[int],
    ) -> list[Completion]:
        """One turn of every answer; `uniforms` [tokens, answers] and `limits`, the tokens that each may have."""
        per_chunk = max(1, self._max_batch // group_size)
        answers: list[Completion] = []
        for start in range(0, len(prompts), per_chunk):
            chunk = prompts[start : start + per_chunk]
            rows = slice(start * group_size, (start + len(chunk)) * group_size)
            answers += self._generate_chunk(
                chunk, group_size, sampling, uniforms[:, rows].to(self._device), limits[rows]
            )
        return answers

    @torch.inference_mode()
    def _generate_chunk(
        self,
        prompts: Sequence[EncodedPrompt],
        group_size: int,
        sampling: SamplingParams,
        uniforms: torch.Tensor,
        limits: Sequence[int],
    ) -> list[Completion]:
        logits_QV, cache, mask_QP, next_position_Q = self._prefill(prompts)
        row_B = torch.arange(len(prompts), device=self._device).repeat_interleave(group_size)
        most = max(limits)
        make_room(cache, row_B, tokens=most)
        logits_BV, mask_BP, position_B = (
            x.index_select(0, row_B) for x in (logits_QV, mask_QP, next_position_Q)
        )
        seen_BT = torch.nn.functional.pad(mask_BP.bool(), (0, most), value=True)
        mask_B11T = torch.zeros(seen_BT.shape, dtype=self._model.dtype, device=self._device)
        mask_B11T = mask_B11T.masked_fill_(~seen_BT, -torch.inf)[:, None, None]
        num_rows = len(prompts) * group_size
        tokens: list[list[int]] = [[] for _ in range(num_rows)]
        logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        stops = torch.tensor(self._processor.stop_token_ids, device=self._device)
        limit_B = torch.tensor(limits, device=self._device)
        alive_B = torch.arange(num_rows, device=self._device)  # which answer each remaining row belongs to
        for step in range(most):
            beat()
            token_B, logprob_B = draw(logits_BV, uniforms[step, alive_B], sampling)
            for row, token, logprob in zip(
                alive_B.tolist(), token_B.tolist(), logprob_B.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(logprob)
            going_B = ~torch.isin(token_B, stops) & (limit_B[alive_B] > step + 1)
            if not going_B.any():
                break
            if not going_B.all():
                keep = going_B.nonzero().squeeze(1)
                cache.reorder_cache(keep)
                token_B, alive_B, mask_B11T, position_B = (
                    token_B[keep],
                    alive_B[keep],
                    mask_B11T[keep],
                    position_B[keep],
                )
            logits_BV = self._decode(
                token_B[:, None],
                self._on_axes(position_B[None, :, None].expand(self._axes, -1, 1)),
                mask_B11T[..., : mask_BP.shape[1] + step + 1],
                cache,
            )
            position_B = position_B + 1
        return [self._completion(t, lp) for t, lp in zip(tokens, logprobs, strict=True)]

    def _prefill(
        self, prompts: Sequence[EncodedPrompt]
    ) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        """Left-padded forward of all prompts: last logits [Q, V], cache, mask [Q, P], next position [Q]."""
        from transformers import DynamicCache

        longest = max(len(p.token_ids) for p in prompts)
        no_image = int(self._family.image_token_id(self._hf) == 0)
        ids_QP = torch.full((len(prompts), longest), no_image)
        mask_QP = torch.zeros_like(ids_QP)
        positions_AQP = torch.ones(self._axes, len(prompts), longest, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor(prompt.token_ids)
            ids_QP[i, -len(ids) :] = ids
            mask_QP[i, -len(ids) :] = 1
            positions_AQP[:, i, -len(ids) :] = self._family.positions(self._hf, ids, prompt.image_grid_thw)
        pixels = [p.pixel_values for p in prompts if p.pixel_values is not None]
        grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
        cache = DynamicCache(config=self._model.config.get_text_config())
        outputs = self._model(
            input_ids=ids_QP.to(self._device),
            attention_mask=mask_QP.to(self._device),
            position_ids=self._on_axes(positions_AQP.to(self._device)),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache: cache},
            **self._images(pixels, grids),
        )
        logits_QV = outputs.logits[:, -1].float()
        next_position_Q = positions_AQP.amax(dim=(0, 2)) + 1
        return logits_QV, cache, mask_QP.to(self._device), next_position_Q.to(self._device)

    def _images(self, pixels: list[torch.Tensor], grids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        if not pixels:
            return {}
        inputs = self._family.hf_inputs(self._hf, torch.cat(pixels), torch.cat(grids))
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _on_axes(self, positions_ABP: torch.Tensor) -> torch.Tensor:
        """As transformers wants them: without the axes where there is only one."""
        return positions_ABP if self._axes > 1 else positions_ABP[0]

    def _completion(self, tokens: list[int], logprobs: list[float]) -> Completion:
        stopped = tokens[-1] in self._processor.stop_token_ids
        return Completion.of_one_turn(
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            versions=(self._version,) * len(tokens),
            finish=Finish.STOP if stopped else Finish.LENGTH,
            text=self._processor.decode(tokens[:-1] if stopped else tokens),
        )


def _uniforms(seed: int, sampling: SamplingParams, rows: int) -> torch.Tensor:
    """[tokens, rows] float64: a float32 uniform reaches only 2^24 values, too coarse for the tail of a large vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sampling.max_new_tokens, rows, generator=generator, dtype=torch.float64)


def draw(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row by inverting the cumulative distribution at `uniform_B`.

    Returns token ids [B] int64 and their log-probs [B] float32 in nats: of the temperature-scaled distribution
    before top-k and top-p, which is what the policy computes and what SGLang reports. Greedy (temperature 0)
    reports log-probs at temperature 1.
    """
    if sampling.temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        token_B = logits_BV.argmax(-1)
        return token_B, logprobs_BV.gather(1, token_B[:, None]).squeeze(1)
    scaled_BV = logits_BV if sampling.temperature == 1 else logits_BV / sampling.temperature
    logprobs_BV = scaled_BV.log_softmax(-1)
    probs_BV = logprobs_BV.exp().double()
    if sampling.top_k or sampling.top_p < 1.0:
        probs_BV = _filter(probs_BV, sampling)
    cumulative_BV = probs_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # u * total can round up to the total itself: stay below it, so that the token has a probability
    place_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    token_B1 = torch.searchsorted(cumulative_BV, place_B1, right=True)
    return token_B1.squeeze(1), logprobs_BV.gather(1, token_B1).squeeze(1)


def _filter(probs_BV: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Zero what top-k and top-p leave out; the most likely token always stays."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    keep_BV = sorted_BV.cumsum(-1) - sorted_BV < sampling.top_p
    if sampling.top_k:
        keep_BV[:, sampling.top_k :] = False
    return torch.zeros_like(probs_BV).scatter(1, order_BV, sorted_BV * keep_BV)
