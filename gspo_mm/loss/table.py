"""The variants of the loss, by `loss.type`, and the user's own, by `loss.python`."""

from __future__ import annotations

import inspect
import traceback
from functools import partial
from typing import Any

from torch import Tensor

from gspo_mm.config import ConfigError, LossConfig
from gspo_mm.loss.cispo import cispo
from gspo_mm.loss.clip import clip
from gspo_mm.loss.gmpo import gmpo
from gspo_mm.loss.sapo import sapo
from gspo_mm.loss.surrogate import LossInputs, LossTerms, Surrogate
from gspo_mm.runtime.named import function_named

SURROGATES: dict[str, Surrogate] = {
    "gspo": clip,
    "gspo_token": clip,
    "grpo": clip,
    "dr_grpo": clip,
    "dapo": clip,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
}


def surrogate_of(config: LossConfig) -> Surrogate:
    """Raises ConfigError for a function of the user's that cannot be imported or called as `function(inputs, **args)`."""
    if config.type:
        return SURROGATES[config.type]
    key = f"loss.python={config.python}"
    try:
        function = function_named(str(config.python))
        inspect.signature(function).bind(None, **config.args)
    except TypeError as error:
        raise ConfigError(f"{key} cannot be called as function(inputs, **loss.args): {error}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    return partial(_users, key, function, config.args)


def _users(key: str, function: Any, args: dict[str, Any], inputs: LossInputs) -> LossTerms:
    """What the user's function returns; whatever is wrong with it is a ConfigError, which all ranks are told."""
    try:
        terms = function(inputs, **args)
    except Exception as error:  # the user's code raises what it likes
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{key} failed at {at.filename}:{at.lineno}: {type(error).__name__}: {error}"
        ) from error
    R, S = len(inputs.logprobs), len(inputs.lengths)
    if not isinstance(terms, LossTerms):
        raise ConfigError(f"{key} returned {type(terms).__name__}; return gspo_mm.loss.LossTerms(loss=...)")
    if isinstance(terms.loss, Tensor) and inputs.logprobs.requires_grad and not terms.loss.requires_grad:
        raise ConfigError(
            f"{key} returned a loss without a gradient; make it of inputs.logprobs or inputs.log_ratio"
        )
    for what, values in {"loss": terms.loss, **terms.clipped, **terms.metrics}.items():
        if not isinstance(values, Tensor) or values.shape not in ((R,), (S,)):
            found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"{key}: {what} has {found}; a tensor of [{R}] (response tokens) or [{S}] (sequences) is wanted"
            )
    if odd := [name for name in terms.metrics if name.endswith(("_min", "_max"))]:
        raise ConfigError(f"{key}: metric {odd[0]} is averaged, and would be named as an extreme; rename it")
    return terms
