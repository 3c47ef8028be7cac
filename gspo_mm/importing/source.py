"""Reads configs of other trainers: whose it is, and its keys with their values. Nothing of a script is executed."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gspo_mm.config import ConfigError
from gspo_mm.config.paths import from_here

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_ARITHMETIC = re.compile(r"\$\(\((.+?)\)\)(?!\))")
# what the calls that make adapters name otherwise than TRL's own arguments
_LORA = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
# what calls that read a model say -> TRL's argument
_OF_MODEL = {
    "model_name": "model_name_or_path",
    "model": "model_name_or_path",
    "load_in_4bit": "load_in_4bit",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A config of another trainer."""

    format: str  # a module of this package
    keys: dict[str, Any]  # nested ones with dots
    gpus: int | None = None  # that a script says it starts on


def read_source(path: Path) -> Source:
    """Raises ConfigError where it is no config of a known trainer."""
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist{from_here(path)}; name a config or script of another trainer"
        )
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        text = ""
    for read in (_python, _mapping, _shell):
        if source := read(text, path):
            return source
    raise ConfigError(
        f"{path} holds no config that is known here; import takes a Python script that calls GRPOConfig, a shell script of "
        "swift rlhf, trl grpo or verl.trainer, or the YAML or JSON of one of these or of AReaL"
    )


def _python(text: str, path: Path) -> Source | None:
    if not re.search(r"\bGRPOConfig\s*\(", text):
        return None
    if path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = re.sub(r"^\s*[!%].*", "", "\n".join(cells), flags=re.MULTILINE)  # of the notebook, not Python
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ConfigError(
            f"{path}: line {error.lineno} is no Python; leave the GRPOConfig call alone"
        ) from None
    names = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call for call in calls if _name(call) == "GRPOConfig"]
    if len(made) != 1:
        raise ConfigError(f"{path} calls GRPOConfig {len(made)} times; leave the one that is to be imported")
    keys = {word.arg or "**": _literal(word.value, names) for word in made[0].keywords}
    for call in calls:
        if _name(call) in ("LoraConfig", "get_peft_model"):
            found = {word.arg: _literal(word.value, names) for word in call.keywords}
            keys |= {ours: found[name] for name, ours in _LORA.items() if name in found}
        if _name(call) in ("from_pretrained", "GRPOTrainer"):
            for word in call.keywords:
                if word.arg in _OF_MODEL and isinstance(word.value, ast.Constant):
                    keys.setdefault(_OF_MODEL[word.arg], word.value.value)
    return Source(format="unsloth" if re.search(r"\bunsloth\b", text) else "trl", keys=keys)


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _literal(node: ast.expr, names: Mapping[str, ast.expr]) -> Any:
    """Its value, where it is written out; else the expression as text, which no number is made of."""
    try:
        if isinstance(node, ast.Name) and node.id in names:
            node = names[node.id]
        return ast.literal_eval(node)
    except ValueError:
        try:
            return _computed(node, lambda name: _literal(names[name], {}))
        except (KeyError, TypeError, ValueError):
            return ast.unparse(node)


def _mapping(text: str, path: Path) -> Source | None:
    try:
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(loaded, dict):
            return None
        values = OmegaConf.to_container(OmegaConf.create(loaded), resolve=True)
    except (yaml.YAMLError, json.JSONDecodeError):
        return None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}; write the value out") from None
    keys = dict(_flat(values))
    roots = {key.partition(".")[0] for key in keys}
    if "actor_rollout_ref" in roots:
        return Source(format="verl", keys=keys)
    if {"actor", "gconfig"} <= roots:
        return Source(format="areal", keys=keys)
    if "rlhf_type" in roots:
        return Source(format="swift", keys=keys)
    if {"num_generations", "max_completion_length", "importance_sampling_level", "loss_type"} & roots:
        return Source(format="trl", keys=keys)
    return None


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value) if isinstance(value, str) else value


def _shell(text: str, path: Path) -> Source | None:
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(_expanded(line, variables))
        words = words[1:] if words[:1] == ["export"] else words
        while words and (assigned := _ASSIGNMENT.match(words[0])):
            variables[assigned[1]] = assigned[2]
            words = words[1:]
        command = " ".join(words)
        kind = re.search(r"\b(swift rlhf|rlhf\.py|trl grpo)\b", command)
        if kind:
            keys = dict(_options(words))
            if "config" in keys:
                raise ConfigError(
                    f"{path} starts from --config {keys['config']}; import that file, and set by hand what the script changes"
                )
            gpus = keys.pop("num_processes", _value(variables.get("NPROC_PER_NODE", "")))
            return Source(
                format="trl" if kind[0] == "trl grpo" else "swift",
                keys=keys,
                gpus=gpus if isinstance(gpus, int) else None,
            )
        if "verl.trainer" in command:
            return Source(format="verl", keys=dict(_overrides(words)))
    keys = dict(_overrides(_expanded(text.replace("\\\n", " "), variables).split()))
    return Source(format="verl", keys=keys) if any("actor_rollout_ref." in key for key in keys) else None


def _words(line: str) -> list[str]:
    """Of a line of shell, without its comment; none where a quoted text goes on in the next."""
    for end in [*(found.start() for found in re.finditer(r"(^|\s)#", line)), len(line)]:
        with suppress(ValueError):  # the sign is within quotes
            return shlex.split(line[:end])
    return []


def _expanded(line: str, variables: Mapping[str, str]) -> str:
    """A line of shell with the variables and sums that are known filled in."""

    def number(name: str) -> Any:
        return _value(variables[name])

    def computed(found: re.Match[str]) -> str:
        try:
            return str(_computed(ast.parse(found[1].replace("$", ""), mode="eval").body, number))
        except (KeyError, SyntaxError, TypeError, ValueError):
            return found[0].replace(" ", "")

    def filled(found: re.Match[str]) -> str:
        return variables.get(found[1] or found[3], found[2] if found[2] is not None else found[0])

    return _VARIABLE.sub(filled, _ARITHMETIC.sub(computed, line))


def _computed(node: ast.expr, value: Any) -> Any:
    """A sum or product of whole numbers; `value(name)` of the names in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return value(node.id)
    if isinstance(node, ast.BinOp):
        left, right = _computed(node.left, value), _computed(node.right, value)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div() | ast.FloorDiv() if right:
                return left // right
    raise ValueError(ast.unparse(node))


def _options(words: list[str]) -> Iterator[tuple[str, Any]]:
    """`--key value` and `--key=value`; one without a value is a switch."""
    places = [place for place, word in enumerate(words) if word.startswith("--")]
    for place, end in zip(places, [*places[1:], len(words)], strict=True):
        name, _, value = words[place][2:].partition("=")
        values = [_value(word) for word in ([value] if value else words[place + 1 : end])]
        yield name.replace("-", "_"), (values[0] if len(values) == 1 else values) if values else True


def _overrides(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Hydra's `key=value`, of which verl's always have a section."""
    for word in words:
        key, equals, value = word.partition("=")
        if equals and "." in key and not key.startswith("-"):
            yield key.lstrip("+~"), _value(value)


def _value(text: str) -> Any:
    """What a word stands for; YAML alone would take 1e-6 for a text."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    if text[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text
