"""The platform that `sglang_cpu.activate` names; imported by SGLang's own processes only."""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

# release_memory_occupation waits for torch's default device, which torch built for CUDA says is one also without any
torch.cuda.synchronize = lambda device=None: None
# SGLang's Triton kernels are launched under it
torch.cpu.device = nullcontext  # pyright: ignore[reportAttributeAccessIssue]
# without a GPU's state to lose a server's other processes can be forks of its first: a start takes 21 s of processor time
# instead of 47 where each imports SGLang for itself. SGLang asks for "spawn" later
multiprocessing.set_start_method("fork", force=True)
multiprocessing.set_start_method = lambda method, force=False: None


class CpuPlatform(SRTPlatform, CpuDeviceMixin):
    """A CPU without sglang's own CPU kernels: everything falls back to torch."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def empty_cache(self) -> None:
        """Nothing. SGLang's own collects garbage, a walk of 0.6 s over its heap at every push, while nothing is sampled."""

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Called before attention is set up. Linear attention gets a CPU's for what GPUs alone can do."""
        from sglang.srt.layers.radix_linear_attention import RadixLinearAttention

        if not any(isinstance(module, RadixLinearAttention) for module in model.modules()):
            return
        from sglang.kernels.ops.attention.fla import layernorm_gated
        from sglang.srt.layers.attention.linear import gdn_backend

        from gspo_mm.serving.cpu_delta import DeltaRule

        layernorm_gated._get_sm_count = lambda device: 1
        gdn_backend.TritonGDNKernel = DeltaRule
