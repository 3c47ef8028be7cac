"""The trained model: transformers' vision tower and megatron-core's decoder, its optimizer and its passes."""

import sys

import torch

# sglang brings a flash_mla that cannot be loaded without a CUDA driver and says so by an OSError, while megatron-core
# 0.19 (transformer/attention.py) expects an ImportError of a package that is not there.
if not torch.cuda.is_available():
    sys.modules.setdefault("flash_mla", None)  # pyright: ignore[reportArgumentType]
