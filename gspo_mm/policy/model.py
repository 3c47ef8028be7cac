"""The policy's module: transformers' vision tower, if there is one, and megatron-core's decoder, over packed sequences.

    pixels -> visual -> features of each distinct image -+
                                                         v (gathered for each occurrence)
    token ids -> embedding -----------------------------> decoder -> hidden states that predict a response token
                                                                        -> output weight -> log-probs [R]

Under pipeline parallelism a rank holds the part of the decoder that its stage (and virtual stage) has: the first
one the tower and the embedding, the last one the output weight. Which tokens a rank holds is in layout.py.

Dims: N packed tokens of this rank, R trained response tokens, V vocabulary, D hidden, I image tokens.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PreTrainedModel

from gspo_mm.config import PolicyConfig
from gspo_mm.config.layout import PlanError, round_up
from gspo_mm.families.base import Family
from gspo_mm.loss.logprobs import linear_logprobs
from gspo_mm.policy.attention import PackedSequences, pack_params
from gspo_mm.policy.collectives import InResponseOrder, in_response_order
from gspo_mm.policy.compat import await_parameters, fuse_weight_gradients
from gspo_mm.policy.layout import Layout, lay_out, padded_tokens
from gspo_mm.policy.parallel import Groups, ParallelPlan
from gspo_mm.policy.precision import DTYPES, fp8_arguments, token_multiple
from gspo_mm.policy.spec import block_spec, has_fused_modules
from gspo_mm.policy.speed import arguments, choices, overridden, packs_vision, recomputed_modules
from gspo_mm.policy.vision import Features, attend_to_all_images, deepstack_leaves
from gspo_mm.runtime.dist import device
from gspo_mm.types import MicroBatch


class PolicyModel(MegatronModule):
    """Log-probs of packed response tokens, images included. `visual` and `language` are its two halves.

    On a pipeline stage that is not the last, `forward` gives the hidden states [N, 1, D] for the next one.
    """

    def __init__(
        self,
        family: Family,
        hf: Any,
        config: PolicyConfig,
        plan: ParallelPlan,
        groups: Groups,
        *,
        vp_stage: int | None = None,
    ) -> None:
        """This rank's part; `vp_stage` numbers its model chunks where plan.vpp > 1. Weights are arbitrary."""
        transformer = transformer_config(family, hf, plan, config)
        super().__init__(config=transformer)
        self.model_type = ModelType.encoder_or_decoder
        self.family = family
        self.hf = hf
        self.plan = plan
        self.groups = groups
        self.vp_stage = vp_stage
        self.pre_process = groups.is_first_stage and not vp_stage
        self.post_process = groups.is_last_stage and vp_stage in (None, plan.vpp - 1)
        self.rotary = family.build_rotary(hf)
        self.visual = family.build_vision(hf) if self.pre_process else None
        self.features: Features | None = None
        if self.visual is not None:
            _replicate(self.visual, DTYPES[config.dtype])
            if packs_vision(config):
                attend_to_all_images(self.visual)
            if config.recompute == "full":
                recompute_blocks(cast(PreTrainedModel, self.visual))
            self.features = Features(
                family, hf, self.visual, groups.tp_cp, cache_bytes=config.vision_cache_mb * 2**20
            )
        self.language = build_decoder(self, family, hf, transformer, plan)
        self.token_multiple = token_multiple(config)
        self.real_rows = torch.empty(0, dtype=torch.bool)  # rows of the pass under way that are not padding
        self.real_tokens = torch.empty(
            0, dtype=torch.int64
        )  # token of the micro-batch in each of these, on the host

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Read by megatron, which sums the gradients of a tied weight over first and last pipeline stage."""
        return self.language.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by the pipeline schedule with the hidden states of the stage before."""
        self.language.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self, batch: MicroBatch, *, temperature: float = 1.0, entropy: bool = False, total: int | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [R] float32 nats of `token_ids[response_mask]` at `temperature`; entropy [R] detached, or None.

        `batch` is on the host, and padded to `total` tokens (default: as few as the layout needs). All ranks of a
        tensor- and context-parallel group get all R.
        """
        target = device()
        layout = lay_out(
            batch,
            self.plan,
            cp_rank=self.groups.cp.rank(),
            tp_rank=self.groups.tp.rank(),
            image_token_id=self.family.image_token_id(self.hf),
            total=total or padded_tokens(batch, self.plan, multiple=self.token_multiple),
        )
        self.real_rows, self.real_tokens = layout.own_is_real.to(target), layout.own_tokens
        packed = pack_params(layout.cu_seqlens, self.rotary(layout.positions.to(target)), batch.trees)
        packed.padding = ~self.real_rows[None]
        embeddings_N1D = self._embed(batch, layout, packed) if self.pre_process else None
        return self.language(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embeddings_N1D,
            packed_seq_params=packed,
            output_processor=self._logprobs,
            output_processor_context=(layout, temperature, entropy),
        )

    def _embed(self, batch: MicroBatch, layout: Layout, packed: PackedSequences) -> torch.Tensor:
        """Token embeddings [N/tp, 1, D] with image features in place of image tokens; fills DeepStack in `packed`."""
        target = device()
        ids = layout.token_ids[None].to(target)
        if self.features is None:
            return self.language.embedding(input_ids=ids, position_ids=None)
        is_image = batch.token_ids == self.family.image_token_id(self.hf)
        image_tokens = int((is_image & ~batch.response_mask).sum())
        grids = torch.empty(0, 3, dtype=torch.int64) if batch.image_grid_thw is None else batch.image_grid_thw
        shown = occurrence_rows(self.family.tokens_per_image(self.hf, grids), batch.image_index.tolist())
        if len(shown) != image_tokens:
            raise ValueError(
                f"{image_tokens} image tokens but {len(shown)} image features in the micro-batch of {batch.names}"
            )
        if not image_tokens and not (self.features.trained and torch.is_grad_enabled()):
            # every rank of the group sees the same, so none waits for another's images
            return self.language.embedding(input_ids=ids, position_ids=None)
        rows = shown[layout.visual_feature].to(target)
        # the tower first: parameters are gathered in the order in which they were made
        features_I = self.features.of(batch, target).index_select(0, rows)
        embeddings_N1D = self.language.embedding(input_ids=ids, position_ids=None)
        first, *levels = features_I.split(embeddings_N1D.shape[-1], dim=-1)
        first, packed.deepstack = deepstack_leaves(first, levels)
        packed.visual_index = layout.visual_index.to(target)
        return embeddings_N1D.index_copy(0, packed.visual_index, first.to(embeddings_N1D.dtype).unsqueeze(1))

    def _logprobs(
        self, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, context: Any, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Called by the decoder in place of its own loss: only rows that predict a trained token meet the weight."""
        layout, temperature, entropy = context
        hidden_N1D, groups = hidden_states, self.groups
        if groups.tp.size() > 1:
            # its backward sums the parts of the gradient that each rank's rows of the vocabulary give
            hidden_N1D = gather_from_sequence_parallel_region(hidden_N1D, tensor_parallel_output_grad=True)
        target = hidden_N1D.device
        await_parameters(output_layer)
        own_R, own_entropy_R = linear_logprobs(
            hidden_N1D[:, 0].index_select(0, layout.predicting_rows.to(target)),
            output_layer.weight if output_weight is None else output_weight,
            layout.targets.to(target),
            vocab=self.hf.get_text_config().vocab_size,
            temperature=temperature,
            entropy=entropy,
            group=groups.tp if groups.tp.size() > 1 else None,
        )
        logprobs_R = InResponseOrder.apply(own_R, layout, groups.cp)
        if own_entropy_R is None:
            return logprobs_R, None  # pyright: ignore[reportReturnType]
        return logprobs_R, in_response_order(own_entropy_R, layout, groups.cp)  # pyright: ignore[reportReturnType]


def occurrence_rows(tokens_per_image: list[int], image_index: list[int]) -> torch.Tensor:
    """Rows of the distinct images' features [sum of tokens_per_image] that each image occurrence shows, in order."""
    starts = [sum(tokens_per_image[:i]) for i in range(len(tokens_per_image))]
    spans = [torch.arange(starts[i], starts[i] + tokens_per_image[i]) for i in image_index]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def build_decoder(
    owner: PolicyModel, family: Family, hf: Any, config: TransformerConfig, plan: ParallelPlan
) -> GPTModel:
    """The language decoder: the one place that knows its class.

    GPTModel, although megatron-core 0.19 calls it deprecated in favour of HybridModel: HybridModel's
    position_embedding_type is one of learned_absolute, rope, yarn, none; it has no hook (output_processor) for
    computing log-probs of chosen rows; and it splits a layer into attention and MLP blocks, which breaks
    layer-indexed DeepStack. To look at again with megatron-core 0.20 (the bound in pyproject.toml).
    """
    bias = family.attention_output_bias(hf)
    spec: Any = block_spec(config, attention_bias=bias, vp_stage=owner.vp_stage)
    with quiet_megatron():
        decoder = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab(hf.get_text_config().vocab_size, plan),
            max_sequence_length=hf.get_text_config().max_position_embeddings,
            pre_process=owner.pre_process,
            post_process=owner.post_process,
            position_embedding_type="none",  # pyright: ignore[reportArgumentType]  # rotary is in attention.py
            share_embeddings_and_output_weights=family.is_tied(hf),
            parallel_output=True,
            vp_stage=owner.vp_stage,
        )
    if has_fused_modules():
        fuse_weight_gradients(decoder)
    return decoder


def transformer_config(
    family: Family, hf: Any, plan: ParallelPlan, config: PolicyConfig
) -> TransformerConfig:
    """megatron's configuration: the family says the architecture, the plan the spread, the rest is here."""
    architecture = family.transformer_arguments(hf)
    fixed = {
        **architecture,
        **fp8_arguments(config),
        **_recompute_arguments(config, architecture),
        **_moe_arguments(config, plan),
        **_spread_arguments(plan),
        **_attention_arguments(plan, architecture),
        **_numeric_arguments(DTYPES[config.dtype]),
    }
    chosen = overridden(arguments(choices(config, plan, architecture)), fixed, config.megatron)
    with quiet_megatron():
        return TransformerConfig(**fixed, **chosen)


def _spread_arguments(plan: ParallelPlan) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": plan.pp,
        "virtual_pipeline_model_parallel_size": plan.vpp if plan.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": plan.first_stage_layers,
        "num_layers_in_last_pipeline_stage": plan.last_stage_layers,
        "context_parallel_size": plan.cp,
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": plan.etp,
        "sequence_parallel": plan.tp > 1,
        # stages tell each other the shapes, except in the interleaved schedule: with two stages next and previous
        # are one peer, whose messages megatron-core 0.19 mixes up unless shapes are known and sends overlap
        "variable_seq_lengths": plan.vpp == 1,
        "overlap_p2p_comm": plan.vpp > 1,
        "batch_p2p_comm": plan.vpp == 1,
        "deallocate_pipeline_outputs": True,
    }


def _attention_arguments(plan: ParallelPlan, architecture: dict[str, Any]) -> dict[str, Any]:
    """How Transformer Engine spreads sinks and windows over context-parallel ranks: by heads, the one way that it has for both
    (dot_product_attention/utils.py of version 2.20, softmax_type).
    """
    by_heads = plan.cp > 1 and ("softmax_type" in architecture or "window_size" in architecture)
    return {"cp_comm_type": "a2a"} if by_heads else {}


def _numeric_arguments(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "attention_softmax_in_fp32": True,
        # gradients are summed over ranks, not averaged: the loss already has its global denominator
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,  # weights come from a Hugging Face folder
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,  # rotary is in attention.py
        "gradient_accumulation_fusion": False,  # see compat.fuse_weight_gradients
        "persist_layer_norm": False,
    }


def recompute_blocks(tower: PreTrainedModel) -> None:
    """Have transformers recompute the tower's blocks in backward; the method's name changes with transformers 5.23."""
    new: Any = getattr(tower, "activation_checkpointing_enable", None)
    (new or tower.gradient_checkpointing_enable)({"use_reentrant": False})


def _recompute_arguments(config: PolicyConfig, architecture: dict[str, Any]) -> dict[str, Any]:
    match config.recompute:
        case "full":
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        case "selective":
            modules = recomputed_modules(architecture)
            return {"recompute_granularity": "selective", "recompute_modules": modules}
        case "none":
            return {}


def _moe_arguments(config: PolicyConfig, plan: ParallelPlan) -> dict[str, Any]:
    moe = config.moe
    if moe.dispatcher == "flex" and not HAVE_DEEP_EP:
        raise PlanError(
            "policy.moe.dispatcher=flex needs GPUs and DeepEP (the module deep_ep), which cannot be imported here; "
            "install it, or set policy.moe.dispatcher=alltoall"
        )
    if moe.dispatcher == "flex" and plan.tp * plan.ep == 1:
        raise PlanError(
            "policy.moe.dispatcher=flex sends tokens between ranks, and policy.parallel has tp=1 and ep=1; set "
            "policy.moe.dispatcher=alltoall, or raise policy.parallel.ep"
        )
    backend = {"moe_flex_dispatcher_backend": "deepep"} if moe.dispatcher == "flex" else {}
    return {
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss else "none",
        "moe_aux_loss_coeff": moe.aux_loss,
        **backend,
    }


def padded_vocab(vocab_size: int, plan: ParallelPlan) -> int:
    """Rows of the embedding: a multiple of 64 per tensor-parallel rank, the same for all tp up to 8 that divide 8.

    Equal over layouts, so that a checkpoint written under one is read under another. Padding rows are never looked
    up and never meet a hidden state.
    """
    return round_up(vocab_size, 64 * math.lcm(8, plan.tp))


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


def _replicate(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`, their gradients summed over tensor-parallel ranks; buffers keep float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.sequence_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
