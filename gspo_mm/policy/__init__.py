"""The trained model: transformers' vision tower and megatron-core's decoder, its optimizer and its passes."""

import sys

import torch

# megatron-core 0.19 imports kernels of these where it finds them, and sglang brings them. Without a CUDA driver flash_mla cannot
# be loaded and says so by an OSError, while megatron (transformer/attention.py) expects an ImportError; the others load, which
# takes seconds, and serve no one.
if not torch.cuda.is_available():
    for _kernels in ("flash_mla", "flash_attn.cute", "flashinfer"):
        sys.modules.setdefault(_kernels, None)  # pyright: ignore[reportArgumentType]
