"""Which options of sglang.launch_server rollout.sglang.extra_args may name: all but those listed here.

Some are decided by keys of the config, from which other parts of the run are set as well. Others would have servers
answer with another model, other prompts or another sampling than the one that training scores, in silence. What merely
rounds otherwise (attention backends, kernels, the cache's dtype) is let through: the comparison of servers with the
policy before the first step, and `logprob_gap` at every step, measure it.

Models with linear attention (Qwen3.5) have states beside the key/value cache, which SGLang 0.5.23 sizes by itself: memory in
the ratio `mamba-full-memory-ratio` (0.9) to the cache's, or `max-mamba-cache-size` states; too few of them lower the number of
sequences decoded together. For the prefix cache a GPU's server keeps a state every `mamba-track-interval` (256) tokens
(`mamba-radix-cache-strategy` extra_buffer), one without overlap scheduling that of a prompt's and an answer's end (no_buffer,
pages of 1 token). States are float32 unless `mamba-ssm-dtype` or config.json's mamba_ssm_dtype says otherwise. /flush_cache,
and with it a push, drops them together with the cache: Scheduler.flush_cache resets the tree and HybridReqToTokenPool.
"""

from __future__ import annotations

from collections.abc import Mapping

# option -> what decides it
_OURS = {
    "model-path": "model.path",
    "model": "model.path",
    "host": "rollout.sglang.host",
    "port": "the run, which finds a free one",
    "api-key": "the run, which draws one for each server",
    "admin-api-key": "the run, which draws one for each server",
    "context-length": "rollout.sglang.context_length",
    "mem-fraction-static": "rollout.sglang.mem_fraction",
    "max-total-tokens": "rollout.sglang.max_tokens",
    "max-running-requests": "rollout.sglang.max_running",
    "limit-mm-data-per-request": "rollout.sglang.max_images",
    "mm-process-config": "data.min_pixels and data.max_pixels",
    "tp-size": "rollout.sglang.tp",
    "tensor-parallel-size": "rollout.sglang.tp",
    "ep-size": "rollout.sglang.ep",
    "expert-parallel-size": "rollout.sglang.ep",
    "ep": "rollout.sglang.ep",
    "dp-size": "rollout.sglang.dp",
    "data-parallel-size": "rollout.sglang.dp",
    "attn-dp-size": "rollout.sglang.dp",
    "attention-data-parallel-size": "rollout.sglang.dp",
    "enable-dp-attention": "rollout.sglang.dp",
    "quantization": "rollout.sglang.fp8",
    "random-seed": "run.seed",
    "base-gpu-id": "rollout.sglang.servers and tp",
    "enable-memory-saver": "rollout.sglang.colocate",
    "weight-version": "the trainer, which numbers the weights that it brings",
}

_MODEL = "servers would answer with another model than the policy"
_SAMPLING = "servers would draw from another distribution than the one whose log-probs they report"
_PROMPT = "prompts are sent as the token ids of model.path's own template and tokenizer"
_PICTURES = "servers would see pictures in another way than the policy"
_REACH = "the run could not reach the server, or bring it weights"

# option -> why not; of a name that ends in a dash all options that begin so
_REFUSED = {
    "json-model-override-args": _MODEL,
    "decrypted-config-file": _MODEL,
    "forward-hooks": _MODEL,
    "modelopt-": _MODEL,
    "quantize-and-serve": _MODEL,
    "rl-quant-profile": _MODEL,
    "kt-": _MODEL,
    "dllm-": _SAMPLING,
    "speculative-": _SAMPLING,
    "decoupled-spec-": _SAMPLING,
    "uno-lora-path": _SAMPLING,
    "preferred-sampling-params": _SAMPLING,
    "sampling-defaults": _SAMPLING,
    "enable-custom-logit-processor": _SAMPLING,
    "enable-strict-thinking": _SAMPLING,
    "enable-watermark": _SAMPLING,
    "watermark-config": _SAMPLING,
    "tokenizer-path": _PROMPT,
    "skip-tokenizer-init": _PROMPT,
    "chat-template": _PROMPT,
    "hf-chat-template-name": _PROMPT,
    "completion-template": _PROMPT,
    "default-chat-template-kwargs": _PROMPT,
    "allow-auto-truncate": "servers would answer the beginning of a prompt instead of all of it",
    "image-processor-backend": _PICTURES,
    "disable-fast-image-processor": _PICTURES,
    "language-only": _PICTURES,
    "language-model-only": _PICTURES,
    "encoder-only": _PICTURES,
    "is-embedding": "servers would give no answers",
    "enable-return-routed-experts": "replies would be many times as large, and nobody reads it",
    "config": "another file could hold any of the options that are refused here",
    "disaggregation-mode": _REACH,
    "pp-size": _REACH,
    "pipeline-parallel-size": _REACH,
    "nnodes": _REACH,
    "node-rank": _REACH,
    "dist-init-addr": _REACH,
    "nccl-init-addr": _REACH,
    "ssl-": _REACH,
    "grpc-mode": _REACH,
    "smg-grpc-mode": _REACH,
}
# values of load-format that read the weights of model.path as they are
_READS_ALL = ("auto", "safetensors", "pt", "fastsafetensors", "runai_streamer", "layered")


def refuse_options(extra_args: Mapping[str, bool | int | float | str]) -> None:
    """Raise ValueError for the first of `extra_args` that a server must not be given."""
    for name, value in extra_args.items():
        if why := refusal(name.strip().lstrip("-").partition("=")[0].replace("_", "-"), value):
            raise ValueError(f"rollout.sglang.extra_args.{name}={value}: {why}; leave it out")


def refusal(option: str, value: bool | int | float | str) -> str:
    """Why a server must not have this option, or ""."""
    named = {name: f"this is decided by {key}" for name, key in _OURS.items()}
    if value not in _READS_ALL:
        readers = ", ".join(_READS_ALL)
        named["load-format"] = (
            f"servers would not start with model.path's weights as they are, as with {readers}"
        )
    if value is not False:  # a switch that is off, or a name that is not one
        named |= _REFUSED
    if option in named:
        return named[option]
    for name, why in named.items():
        if name.endswith("-") and option.startswith(name):
            return why
        if name.startswith(option):  # argparse takes the beginning of a name for the whole
            return f"it is short for {name.rstrip('-')}, and {why}"
    return ""
