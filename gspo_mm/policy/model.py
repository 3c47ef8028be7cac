"""The policy's module: transformers' vision tower in front of megatron-core's decoder, over packed sequences.

    pixels -> visual -> features of each distinct image -+
                                                         v (gathered for each occurrence)
    token ids -> embedding -----------------------------> decoder -> hidden states that predict a response token
                                                                        -> output layer -> log-probs [R]

Dims: N packed tokens, R trained response tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_mm.families.base import Family
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.policy.spec import PackedSequences, block_spec, has_fused_modules, pack_params
from gspo_mm.types import MicroBatch


class PolicyModel(MegatronModule):
    """Log-probs of packed response tokens, images included. `visual` and `language` are its two halves."""

    def __init__(self, family: Family, hf: Any, plan: ParallelPlan, dtype: torch.dtype) -> None:
        config = transformer_config(family, hf, plan, dtype)
        super().__init__(config=config)
        self.family = family
        self.hf = hf
        self.visual = _in_dtype(family.build_vision(hf), dtype)
        self.language = build_decoder(family, hf, config, plan)

    def forward(
        self, batch: MicroBatch, *, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [R] float32 nats of `token_ids[response_mask]` at `temperature`; entropy [R] detached, or None."""
        packed = pack_params(batch.cu_seqlens)
        embeddings_N1D = self._embed(batch, packed)
        target_N = batch.response_mask.nonzero().squeeze(1)
        return self.language(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[:, None],
            attention_mask=None,
            decoder_input=embeddings_N1D,
            packed_seq_params=packed,
            output_processor=self._logprobs,
            output_processor_context={
                "rows": target_N - 1,  # a token is predicted from the one before it
                "targets": batch.token_ids[target_N],
                "temperature": temperature,
                "entropy": entropy,
            },
        )

    def _embed(self, batch: MicroBatch, packed: PackedSequences) -> torch.Tensor:
        """Token embeddings [N, 1, D] with image features in place of image tokens; fills DeepStack in `packed`."""
        embeddings_N1D = self.language.embedding(input_ids=batch.token_ids[None], position_ids=None)
        # an image token that the model sampled is text: no image stands behind it
        is_image_N = (batch.token_ids == self.hf.image_token_id) & ~batch.response_mask
        visual_index = is_image_N.nonzero().squeeze(1)
        if batch.pixel_values is None or batch.image_grid_thw is None:
            if len(visual_index):
                raise ValueError(f"{len(visual_index)} image tokens but no image in the micro-batch")
            return embeddings_N1D
        features, deepstack = self.family.encode_images(
            self.visual, batch.pixel_values.to(embeddings_N1D.dtype), batch.image_grid_thw
        )
        rows = occurrence_rows(
            self.family.tokens_per_image(self.hf, batch.image_grid_thw), batch.image_index.tolist()
        ).to(features.device)
        if len(rows) != len(visual_index):
            raise ValueError(
                f"{len(visual_index)} image tokens but {len(rows)} image features in the micro-batch of {batch.names}"
            )
        packed.visual_index = visual_index
        packed.deepstack = [level.index_select(0, rows) for level in deepstack]
        shown_1D = features.index_select(0, rows).to(embeddings_N1D.dtype).unsqueeze(1)
        return embeddings_N1D.index_copy(0, visual_index, shown_1D)

    def _logprobs(
        self, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, context: Any, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Called by the decoder in place of its own loss: only rows that predict a trained token get logits."""
        hidden_R1D = hidden_states.index_select(0, context["rows"])
        logits_R1V, _bias = output_layer(hidden_R1D, weight=output_weight)
        logits_RV = logits_R1V[:, 0, : self.hf.text_config.vocab_size].float()  # rows of padding are cut off
        return logprobs_of(
            logits_RV, context["targets"], temperature=context["temperature"], entropy=context["entropy"]
        )


def logprobs_of(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, *, temperature: float, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [R] of the targets under softmax(logits / temperature), in nats; entropy [R] without gradient."""
    if temperature != 1.0:
        logits_RV = logits_RV / temperature
    logprobs_RV = logits_RV.log_softmax(-1)
    logprobs_R = logprobs_RV.gather(1, targets_R[:, None]).squeeze(1)
    if not entropy:
        return logprobs_R, None
    with torch.no_grad():
        return logprobs_R, -(logprobs_RV.exp() * logprobs_RV).sum(-1)


def occurrence_rows(tokens_per_image: list[int], image_index: list[int]) -> torch.Tensor:
    """Rows of the distinct images' features [sum of tokens_per_image] that each image occurrence shows, in order."""
    starts = [sum(tokens_per_image[:i]) for i in range(len(tokens_per_image))]
    spans = [torch.arange(starts[i], starts[i] + tokens_per_image[i]) for i in image_index]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def build_decoder(family: Family, hf: Any, config: TransformerConfig, plan: ParallelPlan) -> GPTModel:
    """The language decoder: the one place that knows its class.

    GPTModel, although megatron-core 0.19 calls it deprecated in favour of HybridModel: HybridModel's
    position_embedding_type is one of learned_absolute, rope, yarn, none; its forward derives the angles from the
    sequence length alone, so multi-axis positions cannot be passed in; it has no hook (output_processor) for
    computing log-probs of chosen rows; and it splits a layer into attention and MLP blocks, which breaks
    layer-indexed DeepStack. To look at again with megatron-core 0.20 (the bound in pyproject.toml).
    """
    spec: Any = block_spec(config, attention_bias=config.add_qkv_bias)
    with quiet_megatron():
        decoder: Any = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab(hf.text_config.vocab_size, plan),
            max_sequence_length=hf.text_config.max_position_embeddings,
            position_embedding_type="mrope",
            share_embeddings_and_output_weights=family.is_tied(hf),
            scatter_embedding_sequence_parallel=False,  # image features are put in before scattering
            parallel_output=True,
        )
    decoder.rotary_pos_emb = family.build_rotary(hf)
    return decoder


def transformer_config(family: Family, hf: Any, plan: ParallelPlan, dtype: torch.dtype) -> TransformerConfig:
    """megatron's configuration: the family says the architecture, the plan the spread, the rest is here."""
    with quiet_megatron():
        return TransformerConfig(
            **family.transformer_arguments(hf),
            tensor_model_parallel_size=plan.tp,
            pipeline_model_parallel_size=plan.pp,
            context_parallel_size=plan.cp,
            expert_model_parallel_size=plan.ep,
            expert_tensor_parallel_size=plan.etp,
            sequence_parallel=plan.tp > 1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            attention_softmax_in_fp32=True,
            # gradients are summed over ranks, not averaged: the loss already has its global denominator
            calculate_per_token_loss=True,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            moe_router_dtype="fp32",
            moe_grouped_gemm=has_fused_modules(),
            use_cpu_initialization=not torch.cuda.is_available(),
            perform_initialization=False,  # weights come from a Hugging Face folder
            # fused kernels that need apex or megatron's CUDA extensions
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,  # Transformer Engine's packed kernel restarts positions at every sequence
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
        )


def padded_vocab(vocab_size: int, plan: ParallelPlan) -> int:
    """Rows of the embedding: a multiple of 64 per tensor-parallel rank."""
    unit = 64 * plan.tp
    return -(-vocab_size // unit) * unit


@contextlib.contextmanager
def quiet_megatron() -> Iterator[None]:
    """Hide megatron's notices that are no news here: GPTModel's deprecation, apex and Transformer Engine missing."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core")
            yield
    finally:
        logger.setLevel(level)


def _in_dtype(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Parameters in `dtype`; buffers (rotary frequencies) keep float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module
