"""The gated delta rule of linear attention for SGLang on a CPU, whose own kernels Triton's interpreter cannot run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel


class DeltaRule(TritonGDNKernel):
    """In place of SGLang's kernel: prompts and single tokens alike, token by token.

    q and k [1, N, H, K], v [1, N, A, V], log decay g and step beta [1, N, A]; states [slots, A, V, K] are changed in place.
    """

    supports_packed_decode = False

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        **where: Any,
    ) -> torch.Tensor:
        g = -A_log.exp() * functional.softplus(a.float() + dt_bias)
        return self.extend(q, k, v, g[None], b.sigmoid()[None], **where)[0]

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None, None]:
        q, k = (_unit(x).repeat_interleave(v.shape[2] // x.shape[2], 2)[0] for x in (q, k))
        output, bounds = torch.empty_like(v), query_start_loc.tolist()
        for slot, begin, end in zip(cache_indices.tolist(), bounds, bounds[1:], strict=False):
            state = ssm_states[slot]
            for t in range(begin, end):
                state = state * g[0, t].exp()[:, None, None]
                change = beta[0, t][:, None] * (v[0, t] - torch.einsum("avk,ak->av", state, k[t]))
                state = state + change[:, :, None] * k[t][:, None]
                output[0, t] = torch.einsum("avk,ak->av", state, q[t]) * q.shape[-1] ** -0.5
            ssm_states[slot] = state
        return output, None, None


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
