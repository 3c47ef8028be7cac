"""The trained model: transformers' vision tower and megatron-core's decoder, its optimizer and its passes."""

import logging
import warnings

# Said at import by megatron-core on every machine without Transformer Engine and apex, where the local modules of
# spec.py are what we want. `gspo-mm doctor` tells which fused parts are active.
warnings.filterwarnings(
    "ignore", message=".*(Transformer Engine|Apex)", category=UserWarning, module=r"megatron\.core"
)
# megatron-core imports torch's extension builder, which remarks on a CUDA toolkit without a driver.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
