"""Run folders that resume, and Hugging Face folders in and out."""

import gspo_mm.policy  # noqa: F401  # before anything of megatron-core: it keeps that from looking for kernels in vain
