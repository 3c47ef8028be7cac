"""Options of sglang.launch_server that a user may add, and those that would change what training scores."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from gspo_mm.config import SGLangConfig


def told(option: str, value: Any = True) -> str:
    """Why `option` is refused."""
    with pytest.raises(ValidationError) as caught:
        SGLangConfig(extra_args={option: value})
    (error,) = caught.value.errors()
    assert error["msg"].startswith(f"Value error, rollout.sglang.extra_args.{option}={value}: ")
    assert error["msg"].endswith("; leave it out")
    return error["msg"]


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("model-path", "/other", "model.path"),
        ("tp-size", 4, "rollout.sglang.tp"),
        ("tensor_parallel_size", 4, "rollout.sglang.tp"),
        ("tp", 4, "rollout.sglang.tp"),  # argparse takes it for --tp-size
        ("ep", 2, "rollout.sglang.ep"),
        ("--dp-size", 2, "rollout.sglang.dp"),
        ("port", 30000, "the run"),
        ("context-length", 4096, "rollout.sglang.context_length"),
        ("context-len", 4096, "rollout.sglang.context_length"),
        ("random-seed", 1, "run.seed"),
        ("quantization", "fp8", "rollout.sglang.fp8"),
        ("mm-process-config", "{}", "data.min_pixels"),
        ("enable-memory-saver", False, "rollout.sglang.colocate"),  # switching ours off is deciding as well
    ],
)
def test_what_a_key_decides_is_set_by_that_key(option: str, value: Any, key: str) -> None:
    assert f"decided by {key}" in told(option, value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("json-model-override-args", "{}", "another model"),
        ("speculative-algorithm", "NGRAM", "another distribution"),
        ("speculative_accept_threshold_single", 0.5, "another distribution"),
        ("speculative-algorithm-of-next-year", "X", "another distribution"),
        ("spec", "NGRAM", "short for speculative, and .*another distribution"),
        ("preferred-sampling-params", '{"top_p": 0.5}', "another distribution"),
        (
            "preferred-sampl",
            '{"top_p": 0.5}',
            "short for preferred-sampling-params, and .*another distribution",
        ),
        ("enable-custom-logit-processor", True, "another distribution"),
        ("enable-watermark", True, "another distribution"),
        ("chat-template", "chatml", "model.path's own template"),
        ("tokenizer-path", "/other", "model.path's own template"),
        ("skip-tokenizer-init", True, "model.path's own template"),
        ("load-format", "dummy", "would not start with model.path's weights"),
        ("load-form", "dummy", "short for load-format"),
        ("load-format=dummy", True, "would not start with model.path's weights"),
        ("allow-auto-truncate", True, "the beginning of a prompt"),
        ("image-processor-backend", "pil", "see pictures in another way"),
        ("ssl-keyfile", "k", "could not reach"),
        ("pp-size", 2, "could not reach"),
        ("config", "more.yaml", "another file"),
        ("enable-return-routed-experts", True, "nobody reads it"),
    ],
)
def test_what_changes_model_prompt_or_sampling_is_refused(option: str, value: Any, words: str) -> None:
    assert re.search(words, told(option, value))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attention-backend", "fa3"),
        ("sampling-backend", "pytorch"),
        ("enable-deterministic-inference", True),
        ("kv-cache-dtype", "fp8_e4m3"),
        ("dtype", "half"),
        ("load-format", "fastsafetensors"),
        ("enable-watermark", False),
        ("speculative-adaptive", False),
        ("watchdog", 9),
        ("log-level", "debug"),
        ("chunked-prefill-size", 4096),
        ("enable-lora", True),
        ("disable-radix-cache", True),
    ],
)
def test_what_only_computes_otherwise_passes(option: str, value: Any) -> None:
    assert SGLangConfig(extra_args={option: value}).extra_args == {option: value}
