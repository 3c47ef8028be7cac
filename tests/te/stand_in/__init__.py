"""Transformer Engine's Python code on a CPU: its compiled half, `transformer_engine_torch`, replaced by torch.

What is real: all of transformer_engine.pytorch 2.20.2 (modules, autograd functions, recipes, quantizers, optimizer) and
megatron-core's extensions of it. What is emulated: the kernels, in `kernels.py` (products, norms, rotary, Adam) and
`quantizing.py` (FP8 by torch's own casts: per tensor, and in blocks), and what the ring of context parallelism computes, in
`attention.py`. What is not: cuDNN and flash attention, Triton's permutation, mxfp8. A kernel that is missing raises
NotImplementedError with its name.

`install()` changes torch.cuda and torch.Tensor for good: for a process of its own. Enumerations have the values of
transformer_engine/common/include of that version, which is therefore pinned.
"""

from tests.te.stand_in.install import install

__all__ = ["install"]
