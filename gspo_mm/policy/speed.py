"""What makes the policy fast on a GPU: one list of choices, each with its reason, for a model under a layout.

`transformer_config` and `Policy` apply it, `gspo-mm doctor CONFIG` prints it. `policy.megatron` overrides it by megatron's
names. Read in megatron-core 0.19 (transformer_config.py, moe/, distributed/) and Transformer Engine 2.20.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_mm.config import Config, PolicyConfig
from gspo_mm.config.layout import PlanError
from gspo_mm.families.table import family_of
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.policy.spec import has_fused_modules

# settings of megatron that whole sections of policy stand for
_OURS = ("fp8", "fp4", "recompute")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way of being faster, or of needing less memory."""

    name: str
    on: bool
    # what it saves where it is on; else what it waits for, and what that costs
    why: str
    # arguments of megatron's TransformerConfig where it is on
    megatron: Mapping[str, Any] = field(default_factory=dict)
    # a GPU is here, and stands idle for want of this
    missed: bool = False


def choices_of_run(config: Config | None, ranks: int | None) -> list[Choice]:
    """All choices for a run on so many ranks (None: as few as its layout takes); of a mixture on one rank without a config.

    Raises PlanError, or ValueError for a model folder that cannot be read.
    """
    if config is None:
        architecture = {"num_moe_experts": 8, "activation_func": F.silu, "gated_linear_unit": True}
        return choices(PolicyConfig(), ParallelPlan(), architecture)
    sizes, family = config.policy.parallel, family_of(config.model.path)
    hf = family.load_config(config.model.path)
    plan = ParallelPlan.from_config(sizes, ranks or sizes.tp * sizes.pp * sizes.cp * (sizes.dp or 1))
    plan.check_model(family.dims(hf))
    sees = family.image_token_id(hf) is not None
    return [
        *prepare_process(config),
        *choices(config.policy, plan, family.transformer_arguments(hf), sees=sees),
    ]


def choices(
    config: PolicyConfig, plan: ParallelPlan, architecture: Mapping[str, Any], *, sees: bool = True
) -> list[Choice]:
    """For a family's `transformer_arguments`, on this machine; `sees`: the model takes images."""
    found = [_layers(), *_overlaps(config, plan), _recompute(config, architecture)]
    found.append(_prompts(config, plan, architecture))
    if sees:
        found.append(_vision(config))
    if architecture.get("num_moe_experts"):
        found += _experts(config, plan, architecture)
    if "linear_attention_freq" in architecture:
        found.append(_linear_attention())
    activation, gated = architecture.get("activation_func"), architecture.get("gated_linear_unit", False)
    # the second one bounds its input before a bias is added, which grouped products add themselves
    grouped = architecture.get("num_moe_experts") and config.megatron.get("moe_grouped_gemm", True)
    one_kernel = activation is F.silu or (activation is fused_bias_geglu.quick_gelu and bool(grouped))
    found.append(
        _choice(
            "activation in one kernel",
            has_fused_modules() and gated and one_kernel,
            "SwiGLU, its bias and the router's weights in one pass over memory",
            "for SwiGLU on Transformer Engine's layers (or a sigmoid of 1.702 times its input, in grouped experts); "
            "else three passes over memory",
            bias_activation_fusion=True,
        )
    )
    return [_as_wanted(choice, config.megatron) for choice in found] + list(_NEVER)


def _as_wanted(choice: Choice, wanted: Mapping[str, Any]) -> Choice:
    for name in set(choice.megatron) & set(wanted):
        choice = replace(choice, on=bool(wanted[name]), why=f"policy.megatron.{name}={wanted[name]}")
    return choice


def prepare_process(config: Config) -> list[Choice]:
    """Settings of CUDA in this process, made before anything uses it; what the environment says already, stays."""
    sizes, cuda = config.policy.parallel, torch.cuda.is_available()
    in_order = cuda and sizes.tp * sizes.cp > 1
    if in_order:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # servers on the same GPUs map the trainer's memory, which such segments do not allow everywhere
    expandable = cuda and not (config.rollout.serves and config.sync.mode == "tensor")
    if expandable and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        # in no environment, for servers inherit that
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    return [
        _choice(
            "kernels in order of launch",
            in_order,
            f"CUDA_DEVICE_MAX_CONNECTIONS={os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS')}: transfers start before the products "
            "that they hide behind",
            "CUDA_DEVICE_MAX_CONNECTIONS is set where CUDA and policy.parallel.tp or cp above 1 are",
        ),
        _choice(
            "memory in segments that grow",
            expandable,
            "expandable_segments: micro-batches of different lengths leave no holes",
            "needs CUDA, and another sync.mode than tensor; else memory is lost to holes between micro-batches",
        ),
    ]


def arguments(found: list[Choice]) -> dict[str, Any]:
    """megatron's, of all choices that are on."""
    return {name: value for choice in found if choice.on for name, value in choice.megatron.items()}


def overridden(
    chosen: Mapping[str, Any], fixed: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """`chosen` with the user's `policy.megatron` over it.

    Raises PlanError for a name that megatron does not know, or that the model or another key decides (`fixed`).
    """
    known = {f.name for f in fields(TransformerConfig)}
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; take it out"
            raise PlanError(f"policy.megatron.{name} is no setting of megatron's TransformerConfig{hint}")
        if name in fixed or name.startswith(_OURS):
            raise PlanError(
                f"policy.megatron.{name}={wanted[name]!r} is decided by the model or by another key of policy "
                f"(it is {fixed.get(name)!r}); take it out and set that key"
            )
    return {**chosen, **wanted}


def overlaps_reduction(config: PolicyConfig, plan: ParallelPlan) -> bool:
    """Whether data-parallel ranks exchange gradients and parameters while they compute."""
    wanted = config.optimizer.overlap
    return torch.cuda.is_available() and plan.dp * plan.cp > 1 if wanted is None else wanted


def shares_prompts(config: PolicyConfig, plan: ParallelPlan, architecture: Mapping[str, Any]) -> bool:
    """Whether answers of a micro-batch to the same prompt are packed behind one copy of it.

    Raises PlanError where `policy.share_prompts` asks for it in vain.
    """
    if config.share_prompts is False:
        return False
    obstacles = {
        "Transformer Engine's attention, which takes no trees": has_fused_modules(),
        f"policy.parallel.cp={plan.cp}, which cuts every sequence": plan.cp > 1,
        "layers of linear attention, whose state runs on": "linear_attention_freq" in architecture,
        f"policy.moe.aux_loss={config.moe.aux_loss}, which weighs every token": config.moe.aux_loss > 0,
    }
    if config.share_prompts and (found := [what for what, is_there in obstacles.items() if is_there]):
        raise PlanError(
            f"policy.share_prompts=true does not go with {found[0]}; leave it out, and prompts are shared where they can be"
        )
    return not any(obstacles.values())


def packs_vision(config: PolicyConfig) -> bool:
    """Whether the vision tower's attention takes all images of a micro-batch at once."""
    return torch.cuda.is_available() and config.dtype == "bfloat16"


def recomputed_modules(architecture: Mapping[str, Any]) -> list[str]:
    """What `policy.recompute=selective` makes again: what is cheap for the memory that it holds."""
    if not has_fused_modules():
        return ["core_attn"]  # fused attention keeps no scores
    return ["layernorm", *(["moe_act"] if architecture.get("num_moe_experts") else [])]


def _choice(name: str, on: bool, saves: str, misses: str, **megatron: Any) -> Choice:
    return Choice(name=name, on=on, why=saves if on else misses, megatron=megatron)


def _layers() -> Choice:
    fused = has_fused_modules()
    choice = _choice(
        "fused layers",
        fused,
        "Transformer Engine: norm and product in one, attention without scores, gradients added to their sum in the product",
        "need CUDA and Transformer Engine (pip install 'gspo-mm[te]'); else torch's, several times slower on a GPU",
    )
    return replace(choice, missed=torch.cuda.is_available() and not fused)


def _linear_attention() -> Choice:
    cuda, there = torch.cuda.is_available(), find_spec("fla") is not None
    choice = _choice(
        "linear attention's kernels",
        cuda and there,
        "flash-linear-attention: packed sequences in one call a layer",
        "need CUDA and flash-linear-attention (pip install 'gspo-mm[fla]'), without which a GPU is refused; "
        "on a CPU plain torch computes the same",
    )
    return replace(choice, missed=cuda and not there)


def _overlaps(config: PolicyConfig, plan: ParallelPlan) -> list[Choice]:
    needs = "need CUDA and data- or context-parallel ranks, or policy.optimizer.overlap=true"
    on = overlaps_reduction(config, plan)
    return [
        _choice("gradients reduced during backward", on, "their transfer hides behind the products", needs),
        _choice("parameters gathered during forward", on, "of all updates of a batch but the first", needs),
    ]


def _recompute(config: PolicyConfig, architecture: Mapping[str, Any]) -> Choice:
    parts = " and ".join(recomputed_modules(architecture))
    saves = {
        "full": "policy.recompute=full: only the layers' inputs are kept; a third more computing",
        "selective": f"policy.recompute=selective: {parts} are made again in backward, for little computing",
        "none": "",
    }
    return _choice(
        "recomputation",
        config.recompute != "none",
        saves[config.recompute],
        "policy.recompute=none: fastest, where memory/peak_gib leaves room",
    )


def _prompts(config: PolicyConfig, plan: ParallelPlan, architecture: Mapping[str, Any]) -> Choice:
    return _choice(
        "prompts shared by their answers",
        shares_prompts(config, plan, architecture),
        "each prompt is computed once for all answers of a micro-batch to it, where they are short beside it",
        "for torch's attention alone, without linear attention, policy.parallel.cp and policy.moe.aux_loss, unless "
        "policy.share_prompts=false",
    )


def _vision(config: PolicyConfig) -> Choice:
    return _choice(
        "images attended to at once",
        packs_vision(config),
        "torch's attention for variable lengths, in one call a block",
        "needs CUDA and policy.dtype=bfloat16; else one call for each image, and a wait for their sizes in each block",
    )


def _experts(config: PolicyConfig, plan: ParallelPlan, architecture: Mapping[str, Any]) -> list[Choice]:
    fused, cuda, moe = has_fused_modules(), torch.cuda.is_available(), config.moe
    # what is computed in pieces, out of turn, passes adapters by
    whole = config.lora is None
    flex = moe.dispatcher == "flex"
    shared = bool(architecture.get("moe_shared_expert_intermediate_size"))
    return [
        _choice(
            "experts in one grouped product",
            fused,
            "one kernel for all experts of a rank",
            "needs fused layers; else a product for each expert",
            moe_grouped_gemm=True,
        ),
        _choice(
            "rows sorted by expert in one kernel",
            fused and cuda,
            "permutation and its gradient without an index in memory",
            "needs CUDA and fused layers (Triton); else index_select and its copies",
            moe_permute_fusion=True,
        ),
        _choice(
            "routing in one kernel",
            fused and cuda and not moe.aux_loss,
            "softmax, top-k and the map of a router at once",
            "needs CUDA, fused layers and policy.moe.aux_loss=0; else a dozen small kernels a layer",
            moe_router_fusion=True,
        ),
        _choice(
            "experts' weight gradients during dispatch",
            fused and plan.ep > 1 and whole,
            "they are computed while backward's all-to-all is under way",
            "needs fused layers and policy.parallel.ep above 1, which alone sends tokens between ranks; not with policy.lora",
            overlap_dispatch_backward_with_experts_wgrad=True,
        ),
        _choice(
            "shared experts during dispatch",
            fused and shared and plan.ep > 1 and whole,
            "they are computed while tokens are under way",
            "this model has none"
            if not shared
            else "needs fused layers and policy.parallel.ep above 1; not with policy.lora",
            moe_shared_expert_overlap=True,
        ),
        _choice(
            "dispatch by DeepEP",
            flex,
            "policy.moe.dispatcher=flex: kernels that send tokens across nodes without extra copies",
            "policy.moe.dispatcher=alltoall; flex is faster over several nodes, "
            + (
                "and DeepEP is here"
                if HAVE_DEEP_EP
                else "and needs DeepEP (built from its source, deepseek-ai/DeepEP)"
            ),
        ),
    ]


_NEVER = (
    _choice(
        "CUDA graphs",
        False,
        "",
        "lengths and images differ in every micro-batch, so no graph would be used twice",
    ),
    _choice(
        "torch.compile",
        False,
        "",
        "would compile the vision tower again for each new set of sizes; its products dominate and are cuBLAS's already",
    ),
    _choice(
        "forward and backward of two micro-batches side by side",
        False,
        "",
        "megatron's schedule for it (overlap_moe_expert_parallel_comm) runs a layer's parts by itself and would leave out "
        "DeepStack; experts' weight gradients during dispatch is what is had instead",
    ),
)
