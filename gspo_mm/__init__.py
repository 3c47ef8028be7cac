"""gspo_mm: GSPO reinforcement learning for large vision-language Mixture-of-Experts models.

Start reading at `train.py` (the loop, one line per stage) and `types.py` (what travels between stages).
"""

__version__ = "0.1.0"

import logging
import warnings

# Said at import by megatron-core on every machine without Transformer Engine and apex, where the local modules of
# policy/spec.py are what we want. `gspo-mm doctor` shows which fused parts are active.
warnings.filterwarnings(
    "ignore", message=".*(Transformer Engine|Apex)", category=UserWarning, module=r"megatron\.core"
)
# megatron-core imports torch's extension builder, which remarks on a CUDA toolkit without a driver.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
