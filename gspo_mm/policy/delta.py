"""Linear attention by the gated delta rule: megatron-core's layer, and its kernels in plain torch.

A head's memory is a matrix S [K, V]. Token t lets it fade by α_t = exp(g_t), corrects what it holds under key k_t by a
step β_t towards value v_t, and reads it (Yang, Kautz, Hatamizadeh, 2024, arXiv 2412.06464, eq. 10):

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t / √K

With CUDA the kernels of flash-linear-attention compute that. `delta_rule` and `convolution` are for machines without. Over packed
sequences each begins with an empty memory, and its convolution sees no token of the one before.

Dims: N packed tokens, D channels, A heads, K and V sizes of a key and a value, C tokens of a chunk, M chunks of all
sequences, S sequences.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm import gated_delta_net
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from gspo_mm.config.layout import PlanError

CHUNK = 64


class DeltaNet(GatedDeltaNet):
    """megatron-core's layer; the rate of decay is float32, where megatron-core 0.19 takes exp in the weights' format."""

    def _compute_g_and_beta(
        self,
        A_log_local_cp: torch.Tensor,
        dt_bias_local_cp: torch.Tensor,
        alpha: torch.Tensor,
        beta: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return -A_log_local_cp.float().exp() * F.softplus(alpha.float() + dt_bias_local_cp), beta.sigmoid()


def delta_layer(layer: ModuleSpec, *, norm: Any) -> ModuleSpec:
    """A decoder layer with this in attention's place, its projections of the classes that attention's are.

    `norm`: the class for its output, whose weight is centred at one whatever those of other norms are. Raises PlanError where
    a GPU lacks the kernels.
    """
    if not gated_delta_net.common.HAVE_FLA:  # pyright: ignore[reportAttributeAccessIssue]
        raise PlanError(
            "this model's linear attention needs flash-linear-attention, which cannot be imported here; install it: "
            "pip install 'gspo-mm[fla]'"
        )

    class OutputNorm:
        def __new__(cls, *, config: Any, **kwargs: Any) -> Any:
            config = copy(config)
            config.layernorm_zero_centered_gamma = False
            return norm(config=config, **kwargs)

    parts: Any = layer.submodules
    attention = ModuleSpec(
        module=DeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=parts.self_attention.submodules.linear_qkv,
            out_norm=OutputNorm,
            out_proj=parts.self_attention.submodules.linear_proj,
        ),
    )
    # names of checkpoints: on all layers the norm is where Transformer Engine's hold it
    names = {
        key: name.replace("self_attention.linear_qkv.", "self_attention.in_proj.")
        for key, name in parts.sharded_state_dict_keys_map.items()
    }
    return replace(
        layer, submodules=replace(parts, self_attention=attention, sharded_state_dict_keys_map=names)
    )


def l2norm(states: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Of length 1 along the last dim. In place of fla.modules.l2norm.l2norm."""
    return states * (states.square().sum(-1, keepdim=True) + eps).rsqrt()


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """SiLU of the causal convolution of every channel: [1, N, D] with weights [D, W] and bias [D].

    In place of fla.modules.convolution.causal_conv1d.
    """
    width, lengths = weight.shape[1], cu_seqlens.diff().tolist()
    place_N = torch.cat([torch.arange(length) for length in lengths])
    total_1ND = x * weight[:, -1]
    for back in range(1, width):
        earlier_1ND = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        total_1ND = total_1ND + earlier_1ND * (place_N >= back).to(x.dtype)[:, None] * weight[:, -1 - back]
    return F.silu(total_1ND if bias is None else total_1ND + bias), None


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Outputs [1, N, A, V] of queries and keys [1, N, A, K], values [1, N, A, V], log decay g and step β [1, N, A].

    Computed in float32 at least, in place of fla.ops.gated_delta_rule.chunk_gated_delta_rule: all chunks at once what
    happens inside them (section 3.3 of the paper), then chunk by chunk of all sequences their memory.
    """
    lengths = cu_seqlens.diff().tolist()
    size = max(1, min(CHUNK, max(lengths)))
    counts = [-(-length // size) for length in lengths]
    slot_N = _slots(lengths, counts, size)
    wide = torch.promote_types(query.dtype, torch.float32)

    def chunked(states: torch.Tensor) -> torch.Tensor:
        """[1, N, A, ...] -> [M, A, C, ...], zeros where a chunk ends early: such a token changes no memory."""
        empty = states.new_zeros(sum(counts) * size, *states.shape[2:], dtype=wide)
        return empty.index_copy(0, slot_N, states[0].to(wide)).unflatten(0, (-1, size)).transpose(1, 2)

    q_MACK, k_MACK, v_MACV, g_MAC, beta_MAC = map(chunked, (query, key, value, g, beta))
    # in float64: differences of sums that grow to hundreds would lose what one token fades
    fade_MAC = g_MAC.double().cumsum(-1)
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    between_MACC = (
        (fade_MAC.unsqueeze(-1) - fade_MAC.unsqueeze(-2)).masked_fill(future, -torch.inf).exp().to(wide)
    )
    q_MACK = q_MACK * q_MACK.shape[-1] ** -0.5
    step_MAC1, faded_MAC1 = beta_MAC.unsqueeze(-1), fade_MAC.exp().unsqueeze(-1).to(wide)
    # (I + tril(β k kᵀ fade, −1)) x = right, for what is written without a memory and for what a memory takes from it
    system_MACC = (k_MACK * step_MAC1) @ k_MACK.mT * between_MACC
    right = torch.cat([v_MACV * step_MAC1, k_MACK * step_MAC1 * faded_MAC1], dim=-1)
    solved = torch.linalg.solve_triangular(system_MACC, right, upper=False, unitriangular=True)
    written_MACV, taken_MACK = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    read_MACK, seen_MACC = q_MACK * faded_MAC1, q_MACK @ k_MACK.mT * between_MACC
    last_MA1 = fade_MAC[..., -1:]
    kept_MACK = k_MACK * (last_MA1 - fade_MAC).exp().unsqueeze(-1).to(wide)
    decay_MA11 = last_MA1.exp().unsqueeze(-1).to(wide)

    order = sorted(
        range(len(counts)), key=lambda s: -counts[s]
    )  # the longest first: those that go on are the first ones
    starts = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    memory_SAKV = query.new_zeros(len(counts), key.shape[2], key.shape[3], value.shape[3], dtype=wide)
    outputs, places = [], []
    for number in range(max(counts)):
        going = [s for s in order if counts[s] > number]
        chunk = starts[going] + number
        memory_SAKV = memory_SAKV[: len(going)]
        new_SACV = written_MACV[chunk] - taken_MACK[chunk] @ memory_SAKV
        outputs.append(read_MACK[chunk] @ memory_SAKV + seen_MACC[chunk] @ new_SACV)
        places.append(chunk)
        memory_SAKV = memory_SAKV * decay_MA11[chunk] + kept_MACK[chunk].mT @ new_SACV
    output_MACV = torch.cat(outputs)[torch.cat(places).argsort()]
    return output_MACV.transpose(1, 2).flatten(0, 1)[slot_N][None].to(value.dtype), None


def _slots(lengths: list[int], counts: list[int], size: int) -> torch.Tensor:
    """[N] int64: where each token stands when every sequence is filled up to whole chunks."""
    starts = (torch.tensor(counts).cumsum(0) - torch.tensor(counts)) * size
    return torch.cat([start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)])
