#!/usr/bin/env python3
"""Write configs/keys.md: every key of a config with its type, default and meaning, from the schema in gspo_mm/config/.

tools/config_keys.py          # after a change of the schema; a test compares
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo_mm.config import Config

OUT = Path(__file__).parents[1] / "configs" / "keys.md"
_HEAD = """\
# Every key

Written by `tools/config_keys.py` from `gspo_mm/config/`. How to choose numbers: [README.md](README.md). *needed*: has no default.
Any key can be set on a command line: `gspo-mm train CONFIG policy.optimizer.lr=1.0e-5`. A config that begins with
`extends: OTHER.yaml` holds only what it changes, and `${run.seed}` stands for the value of another key.
"""
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def keys_page() -> str:
    """The text of the page."""
    schema = Config.model_json_schema()
    lines = [_HEAD]
    for name, section in schema["properties"].items():
        lines += [f"## {name}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key}` | {_type(schema, node)} | {default} | {_cell(node.get('description', ''))} |"
            for key, node, default in _rows(schema, section, name)
        ]
        lines.append("")
    return "\n".join(lines)


def _rows(
    schema: dict[str, Any], node: dict[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Keys below a section, with their part of the schema and their default."""
    section = _section(schema, node)
    for name, child in section.get("properties", {}).items():
        key = f"{prefix}.{name}"
        inner = _section(schema, child)
        # one that is there without being given needs no line of its own
        if not inner or child.get("default", {}) is None:
            needed = name in section.get("required", [])
            yield key, child, "*needed*" if needed else f"`{_cell(json.dumps(child.get('default')))}`"
        yield from _rows(schema, child, key)
        for form in _forms(child):
            if "items" in form and (entry := _section(schema, form["items"])):
                yield from _rows(schema, entry, f"{key}[]")


def _section(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The section that a key holds, or may hold beside null; nothing for a value."""
    for form in [node, *_forms(node)]:
        found = _resolved(schema, form)
        if "properties" in found:
            return found
    return {}


def _forms(node: dict[str, Any]) -> list[dict[str, Any]]:
    return node.get("anyOf") or node.get("oneOf") or []


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _type(schema: dict[str, Any], node: dict[str, Any]) -> str:
    if forms := _forms(node):
        return " or ".join(dict.fromkeys(_type(schema, form) for form in forms))
    node = _resolved(schema, node)
    if "properties" in node:
        return "section"
    if "enum" in node:
        return ", ".join(f"`{each}`" for each in node["enum"])
    kind = node.get("type")
    if kind == "null":
        return "null"
    if kind == "array":
        return f"list of {_type(schema, node['items'])}"
    bounds = [f"{sign} {node[name]}" for name, sign in _BOUNDS.items() if name in node]
    return " ".join([_TYPES.get(str(kind), "any"), ", ".join(bounds)]).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    OUT.write_text(keys_page())
    print(OUT)
