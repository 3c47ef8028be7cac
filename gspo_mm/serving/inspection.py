"""What a server says about itself, held against the run before it is asked anything.

Servers that somebody else keeps running (rollout.sglang.urls) were given a model and options that nobody has checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_mm.config import Config
from gspo_mm.config.server_options import refusal
from gspo_mm.serving.admin import info_of
from gspo_mm.serving.server import Server, ServerError

# settings that a server is refused for; off are those that it does not report, and these values
_TOLD = (
    "speculative_algorithm", "dllm_algorithm", "preferred_sampling_params", "enable_watermark", "is_embedding",
    "json_model_override_args", "skip_tokenizer_init", "allow_auto_truncate", "language_only",
)  # fmt: skip
_OFF = (None, False, "", "{}", {})


def inspect_servers(servers: list[Server], config: Config) -> bool:
    """Whether a server draws by the seeds of its requests alone. Raises ServerError for one that the run cannot use."""
    seeded = False
    for server in servers:
        info = info_of(server, "/server_info", "/get_server_info")
        check_server(server, info | info_of(server, "/model_info", "/get_model_info"), config)
        seeded |= bool(info.get("enable_deterministic_inference"))
    return seeded


def check_server(server: Server, info: dict[str, Any], config: Config) -> None:
    """Raise ServerError for a server that answers with another model or another sampling than the run's."""
    for name in _TOLD:
        if (value := info.get(name)) not in _OFF:
            why = refusal(name.replace("_", "-"), value)
            raise ServerError(
                f"server {server.name} at {server.url} was started with {name}={value}: {why}; start it without"
            )
    needed = config.rollout.sglang.context_length or config.longest
    length = info.get("context_length")
    if isinstance(length, int) and length < needed:
        raise ServerError(
            f"server {server.name} at {server.url} has a context of {length} tokens, and with "
            f"data.max_prompt_tokens, rollout.sampling.max_new_tokens and rollout.environment {needed} are needed; start it "
            f"with --context-length {needed}, or lower them"
        )
    file = Path(config.model.path) / "config.json"
    ours = json.loads(file.read_text()).get("architectures") if file.exists() else None
    theirs = info.get("architectures")
    if ours and theirs and ours != theirs:
        raise ServerError(
            f"server {server.name} at {server.url} serves {info.get('model_path')}, a {theirs[0]}, and "
            f"model.path={config.model.path} is a {ours[0]}; start it with this model"
        )
