"""What YAML 1.1 reads otherwise than it is written: `no` without quotes is False, 012 is 10, 1:30 is 90.

For config files, overrides and reward files. A switch may be written as yes, no, on or off; where a text could stand,
such a word is refused, because a task, an option or an answer called "no" would silently be False. Numbers that YAML
takes for octal or base 60 are refused everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

type KeyPath = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Misread:
    """A scalar without quotes."""

    path: KeyPath
    written: str
    read: Any  # what YAML makes of it
    is_key: bool = False

    @property
    def sentence(self) -> str:
        key = ".".join(map(str, self.path))
        meant = (
            f"{str(self.read).lower()}, if that is meant" if isinstance(self.read, bool) else f"{self.read}"
        )
        what = f"the key {self.written}" if self.is_key else f"{key}={self.written}"
        return f"{what} without quotes is {self.read!r} in YAML; write '{self.written}' in quotes, or {meant}"


def misread(text: str, prefix: KeyPath = ()) -> list[Misread]:
    """All in a YAML text that can be loaded."""
    return list(_walk(yaml.compose(text, Loader=yaml.SafeLoader), prefix))


def faults(found: Sequence[Misread], values: Any, refused: Callable[[Any], Sequence[KeyPath]]) -> list[str]:
    """Sentences for those that `values` still holds and that are no switches.

    `refused(values)`: places that cannot hold what `values` has there. A place that refuses the word as a text is a switch.
    """
    found = [each for each in found if each.is_key or _at(values, each.path) == each.read]
    words = [each for each in found if isinstance(each.read, bool) and not each.is_key]
    texts = copy.deepcopy(values)
    for each in words:
        _at(texts, each.path[:-1])[each.path[-1]] = each.written
    switches = (
        {tuple(place)[: len(each.path)] for place in refused(texts) for each in words} if words else set()
    )
    return [each.sentence for each in found if each.is_key or each.path not in switches]


def _walk(node: Any, path: KeyPath) -> Iterator[Misread]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            for each in _walk(key, (*path, name)):
                yield Misread(path=each.path, written=each.written, read=each.read, is_key=True)
            yield from _walk(value, (*path, name))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _walk(value, (*path, number))
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        kind, text = node.tag.rpartition(":")[2], node.value
        read = yaml.safe_load(text) if kind in ("bool", "int", "float") else None
        if (kind == "bool" and text.lower() not in ("true", "false")) or (
            kind in ("int", "float") and (":" in text or _is_octal(text))
        ):
            yield Misread(path=path, written=text, read=read)


def _is_octal(text: str) -> bool:
    digits = text.lstrip("+-").replace("_", "")
    return digits.isdecimal() and digits.startswith("0") and int(digits) != int(digits, 8)


def _at(values: Any, path: KeyPath) -> Any:
    """The value at a path; None where there is none."""
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values
