"""The module `transformer_engine_torch`: enumerations at once, functions when they are defined, others by name only.

Members of enumerations in the order of transformer_engine/common/include/transformer_engine/*.h and pytorch/csrc/pybind.cpp.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

# transformer_engine.h: NVTEDType
DType = enum.IntEnum(
    "DType",
    {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
    }
    | {"kFloat4E2M1": 10},
)

_LAYOUTS = (
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D "
    "THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD "
    "Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD "
    "Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET"
)
_MEMBERS = {
    "NVTE_QKV_Format": "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD "
    "NVTE_BHSD NVTE_QKV_Format_NOT_SET",
    "NVTE_QKV_Layout": " ".join(f"NVTE_{layout}" for layout in _LAYOUTS.split()),
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
    "NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING",
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT "
    "GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "CommOverlapType": "RS AG",
    "CommOverlapAlgo": "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS "
    "SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT INVALID",
}
# names that Transformer Engine imports when it is imported itself; whether they are emulated shows when they are called
_FUNCTIONS = (
    "quantize create_empty_quantized_tensor dequantize bgrad_quantize split_quantize multi_tensor_quantize fp8_transpose "
    "compute_amax generic_gemm te_general_grouped_gemm layernorm_fwd layernorm_bwd rmsnorm_fwd rmsnorm_bwd "
    "fused_rope_forward fused_rope_backward convert_thd_to_bshd convert_bshd_to_thd get_fused_attn_backend "
    "multi_tensor_adam multi_tensor_adam_fp8 multi_tensor_adam_capturable multi_tensor_adam_capturable_master "
    "multi_tensor_adam_param_remainder multi_tensor_sgd multi_tensor_l2norm multi_tensor_unscale_l2norm multi_tensor_scale "
    "multi_tensor_scale_tensor multi_tensor_compute_scale_and_scale_inv fp8_block_scaling_compute_partial_amax "
    "fp8_block_scaling_partial_cast"
)
# read by class, and never made here
_CLASSES = ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "CommOverlapCore", "FP8TensorMeta")


class Names(types.ModuleType):
    """Any other name is a function, looked up when it is called: NotImplementedError where nothing defines it."""

    def __init__(self) -> None:
        super().__init__("transformer_engine_torch")
        self.__spec__ = ModuleSpec("transformer_engine_torch", None)
        self._functions: dict[str, Callable[..., Any]] = {}
        self.DType = DType
        for name, members in _MEMBERS.items():
            setattr(self, name, enum.IntEnum(name, {member: i for i, member in enumerate(members.split())}))
        backends = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
        self.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
        for name in _CLASSES:
            setattr(self, name, type(name, (), {}))
        # libraries that an H100 would have
        self.get_cublasLt_version, self.get_cudnn_version = (lambda: 130100), (lambda: 92400)
        self.get_num_cublas_streams = lambda: 1
        for name in _FUNCTIONS.split():
            setattr(self, name, self.__getattr__(name))

    def define(self, module: types.ModuleType) -> None:
        """Take over the public functions of a module."""
        self._functions |= {
            name: value
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and name[0] != "_"
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*args: Any, **kwargs: Any) -> Any:
            if name not in self._functions:
                raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")
            return self._functions[name](*args, **kwargs)

        called.__name__ = name
        return called
