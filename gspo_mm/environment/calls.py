"""Calls of tools in a model's own words. The families write them in three ways, told apart by their looks:

    <tool_call>{"name": "zoom_in", "arguments": {"box": [1, 2, 3, 4]}}</tool_call>              Qwen2.5, Qwen3
    <tool_call><function=zoom_in><parameter=box>[1, 2, 3, 4]</parameter></function></tool_call>   Qwen3-Coder, Qwen3.5
    <tool_call>zoom_in<arg_key>box</arg_key><arg_value>[1, 2, 3, 4]</arg_value></tool_call>       GLM-4.5

What a value is where it is written between tags: JSON if it can be read as JSON, else text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_NAME = re.compile(r"\s*([\w.-]+)\s*(?=<arg_key>|\Z)")
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


class CallError(ValueError):
    """A call that is none; the message is for the model."""


@dataclass(frozen=True, kw_only=True)
class Call:
    name: str
    arguments: Mapping[str, Any]


def read_calls(text: str) -> list[Call]:
    """The calls in a turn's text, in order. Raises CallError for one that cannot be read."""
    return [_read(body) for body in _CALL.findall(text)]


def _read(body: str) -> Call:
    if found := _FUNCTION.fullmatch(body):
        return Call(
            name=found[1].strip(), arguments={k.strip(): _value(v) for k, v in _PARAMETER.findall(found[2])}
        )
    if found := _NAME.match(body):
        return Call(name=found[1], arguments={k.strip(): _value(v) for k, v in _ARGUMENT.findall(body)})
    try:
        call = json.loads(body)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CallError(f"the call is no JSON: {error}") from None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        raise CallError('the call has no name; write {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise CallError(f"the arguments of {name} are no object")
    return Call(name=name, arguments=arguments)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text.strip()
