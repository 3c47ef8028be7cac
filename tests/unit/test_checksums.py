"""Checksums of weights, against the code that SGLang's servers run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from gspo_mm.serving.server import ServerError
from gspo_mm.sync.checksums import compare_one, sum_of_mixed_words

SIZES = [1, 3, 4, 1000, 4 * 8192, 4 * 8192 + 1, 300_000]

# SGLang's kernel, run by triton's interpreter; with -O its demand for a GPU falls away
_KERNEL = """
import importlib.util, json, sys, torch
spec = importlib.util.find_spec("sglang")
path = spec.submodule_search_locations[0] + "/kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("kernel", path)
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
tensors = (torch.arange(n, dtype=torch.int64).mul(2654435761).to(torch.uint8) for n in json.loads(sys.argv[1]))
print(json.dumps([kernel.gpu_tensor_hash(tensor) for tensor in tensors]))
"""


def test_checksums_of_gpus_are_those_of_sglangs_kernel() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-c", _KERNEL, json.dumps(SIZES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tensors = (torch.arange(n, dtype=torch.int64).mul(2654435761).to(torch.uint8) for n in SIZES)
    assert [sum_of_mixed_words(tensor) for tensor in tensors] == json.loads(done.stdout)


def test_other_values_and_missing_tensors_are_named() -> None:
    sent = {"a": "1", "b": "2"}
    compare_one("s", sent, {"a": "1", "b": "2", "c": "3"})
    with pytest.raises(ServerError, match=r"server s holds other values of 1 of 2 .* first b"):
        compare_one("s", sent, {"a": "1", "b": "3"})
    with pytest.raises(ServerError, match="server s has no tensor b"):
        compare_one("s", sent, {"a": "1"})
