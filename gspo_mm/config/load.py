"""YAML -> OmegaConf (`${...}`, `key=value` overrides) -> Config; every fault becomes one sentence with key, value and fix.

`extends: FILE` on top of a config, beside it or by a path from it, is a config that it changes. Where a config or the
overrides name loss.type or loss.python, what they extend says nothing of the variant (loss.VARIANT_KEYS) any more: clip
ranges of one loss mean nothing for another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from gspo_mm.config.base import ALTERNATIVES, ConfigError
from gspo_mm.config.loss import VARIANT_KEYS
from gspo_mm.config.paths import from_here
from gspo_mm.config.schema import Config
from gspo_mm.config.unquoted import Misread, faults, misread


def load_config(path: str | Path, overrides: list[str] | None = None, *, any_world: bool = False) -> Config:
    """Read a YAML config, apply `key=value` overrides, resolve `${...}` and validate.

    `any_world`: it may be for another number of ranks than were started, as the one of a run to be continued.

    Raises ConfigError: one sentence per fault, naming the key, the value and the fix.
    """
    path = Path(path)
    changes = OmegaConf.merge({}, *[_parse_override(item) for item in overrides or []])
    unquoted: list[Misread] = []
    try:
        raw = _changed(_read(path, unquoted), changes)
        values = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{path}: {error.full_key} is still to be filled in; replace its ???") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    for item in overrides or []:
        key, _, value = item.partition("=")
        unquoted += misread(value, tuple(key.split(".")))

    def refused(values: Any) -> list[tuple[Any, ...]]:
        try:
            Config.model_validate(values, context={"any_world": any_world})
        except ValidationError as error:
            return [_location(fault) for fault in error.errors(include_url=False)]
        return []

    if found := faults(unquoted, values, refused):
        raise ConfigError("\n".join(f"{path}: {sentence}" for sentence in found))
    return parse_config(values, source=str(path), any_world=any_world)


def _read(path: Path, unquoted: list[Misread], within: tuple[Path, ...] = ()) -> Any:
    """A config file on top of those that it extends; `unquoted` is filled with what YAML misreads in them."""
    said = f"{within[-1]}: extends={path}, which" if within else f"config file {path}"
    if not path.is_file():
        raise ConfigError(f"{said} does not exist{from_here(path)}; try configs/quickstart.yaml")
    if path.resolve() in [each.resolve() for each in within]:
        raise ConfigError(f"{said} extends itself; name another file, or none")
    try:
        loaded: Any = OmegaConf.load(path)
        found = misread(path.read_text())
    except Exception as error:  # YAML's own scanner and parser errors share no public base with OmegaConf's
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        raise
    if not OmegaConf.is_dict(loaded) or not loaded:
        raise ConfigError(f"{path} holds no mapping of sections; start from configs/quickstart.yaml")
    unquoted += found
    extends = loaded.pop("extends", None)
    return (
        loaded
        if extends is None
        else _changed(_read(path.parent / str(extends), unquoted, (*within, path)), loaded)
    )


def _changed(base: Any, changes: Any) -> Any:
    """`changes` on top of `base`, without the keys of another variant of the loss."""
    if any(OmegaConf.select(changes, f"loss.{key}") is not None for key in ("type", "python")):
        for key in VARIANT_KEYS:
            section, _, name = key.partition(".")
            if OmegaConf.is_dict(base.get(section)):
                base[section].pop(name, None)
    return OmegaConf.merge(base, changes)


def _parse_override(item: str) -> Any:
    if "=" not in item or item.startswith("-"):
        raise ConfigError(f"override {item!r} is not of the form key=value, as in train.steps=10")
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as error:
        if type(error).__module__.startswith(("yaml", "omegaconf")):
            key, _, value = item.partition("=")
            raise ConfigError(
                f"override {key}={value} has a value that YAML cannot read; put text with braces or colons in "
                f"quotes of its own, as in '{key}=[\"{value.strip('[]')}\"]'"
            ) from None
        raise


def parse_config(values: Any, *, source: str = "config", any_world: bool = False) -> Config:
    """Validate plain values; raises ConfigError as `load_config` does."""
    try:
        return Config.model_validate(values, context={"any_world": any_world})
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, source))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; `load_config` reads it back to an equal value."""
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), path)


def _sentences(error: ValidationError, source: str) -> list[str]:
    return [f"{source}: {_sentence(fault)}" for fault in error.errors(include_url=False)]


def _sentence(fault: Any) -> str:
    location = _location(fault)
    key = ".".join(str(part) for part in location)
    kind, value = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key}={value!r}; {_known_keys(location)}"
    if kind == "missing":
        return f"key {key} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    return f"{key}={value!r} is refused: {message[0].lower()}{message[1:]}{_hint(kind, value)}"


def _location(fault: Any) -> tuple[Any, ...]:
    return tuple(part for part in fault["loc"] if part not in ALTERNATIVES)


def _hint(kind: str, value: Any) -> str:
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return (
            "; YAML reads 1e-6 as text: write 1.0e-6" if "e" in value.lower() else "; write it without quotes"
        )
    if kind == "int_from_float" or (kind == "int_type" and isinstance(value, float)):
        return "; write a whole number"
    return ""


def _known_keys(location: tuple[Any, ...]) -> str:
    """Name the keys that the section at `location[:-1]` has, the nearest in spelling first."""
    import difflib

    section: type[BaseModel] = Config
    for part in location[:-1]:
        if isinstance(part, str):  # a number is a place in a list of sections
            section = _section_in(section.model_fields[part].annotation)
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(names)}"


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section that a key holds, be it optional, in a list or one alternative of several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    (section,) = {_section_in(a) for a in get_args(annotation) if _holds_section(a)}
    return section


def _holds_section(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(_holds_section(a) for a in get_args(annotation))
