"""Keys of another trainer that are taken over, and those that are not, each with its reason -> YAML of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import yaml

from gspo_mm.config import Config, ConfigError, parse_config
from gspo_mm.config.loss import WIDEST_OF_ANSWERS
from gspo_mm.importing.source import Source

MISSING = "???"  # OmegaConf's own mark: a config that still holds it is refused with the key's name
_TEXTS = ("run.name", "policy.dtype")  # keys that hold no number; of those that a table fills
# section.key of ours -> what a user has to say, which no config of another trainer can
_BY_HAND = {
    "model.path": "FILL IN: a Hugging Face folder{model}",
    "data.train": "FILL IN: WebDataset shards, made by tools/make_shards.py rows{data}",
    "reward.file": "FILL IN: a reward file, see configs/rewards/README.md{reward}",
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the keys of a trainer mean here."""

    name: str
    # what it does where a key is not given, of keys whose meaning here would be another
    defaults: Mapping[str, Any]
    # key there -> key here, for values that are taken over as they are
    direct: Mapping[str, str]
    # key there, or a pattern of keys -> why it is not taken over
    reasons: Mapping[str, str]
    # keys there that say which model, data and reward it is about
    about: Mapping[str, tuple[str, ...]]
    # all that takes more than a table
    translate: Callable[[Translation], None]


class Translation:
    """What becomes of each key of a source."""

    def __init__(self, source: Source, form: Format, *, gpus: int | None = None) -> None:
        self.given = source.keys
        self.format = form
        self.gpus = gpus or source.gpus or 1  # that batch sizes of TRL and ms-swift are per
        # key of ours -> value, comment
        self.settings: dict[str, tuple[Any, str]] = {}
        # key of theirs, as it is said -> why it is not taken over
        self.left: dict[str, str] = {}
        self._taken: set[str] = set()  # keys of theirs that were looked at
        self._named: set[str] = set()  # and those that a comment or a reason names

    def take(self, name: str, kind: Any = object) -> Any:
        """Its value, or what it is there without being given; None where that is no `kind`, as with what a script computes."""
        self._taken.add(name)
        value = self.given.get(name, self.format.defaults.get(name))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
            return value
        self.leave(name, "no value that can be read from the file; set it here")
        return self.format.defaults.get(name)

    def said(self, *names: str) -> str:
        """For comments: the keys there, with their values."""
        said = [f"{name}={self.given[name]!s:.80}" for name in names if name in self.given]
        missing = [name for name in names if name not in self.given and name in self.format.defaults]
        return ", ".join([*said, *(f"{name}={self.format.defaults[name]} by default" for name in missing)])

    def put(self, key: str, value: Any, *names: str, note: str = "") -> None:
        """Set a key of ours to what these keys of theirs say."""
        self._named |= set(names)
        self.settings[key] = (value, "; ".join(part for part in (self.said(*names), note) if part))

    def leave(self, name: str, why: str) -> None:
        self._named.add(name)
        self.left[self.said(name)] = why

    def put_clip(self, low: float, high: float, *names: str) -> None:
        """The clip range, which keys for the lower bound and then the upper one give, unless it is one of tokens at a level of
        sequences.
        """
        if self.settings["loss.type"][0] in ("gspo", "gspo_token") and max(low, high) > WIDEST_OF_ANSWERS:
            for name in dict.fromkeys(names):
                self.leave(
                    name,
                    "refused: the ratio of a whole answer stays within about 1e-3, so that this range never clips (it is "
                    "one of tokens); the paper's 3e-4 and 4e-4 stand here",
                )
        else:
            self.put("loss.clip_low", low, names[0])
            self.put("loss.clip_high", high, names[-1])

    def put_batch(
        self, prompts: int, updates: int, *, of: Sequence[str], by: Sequence[str], note: str = ""
    ) -> None:
        """Prompts of a rollout batch, and the updates that are made of it: what keys `of` the batch and `by` its parts say."""
        self.put("rollout.prompts_per_step", prompts, *of, note=note)
        fitting = max(count for count in range(1, max(updates, 1) + 1) if prompts % count == 0)
        note = "" if fitting == updates else f"{updates} there, which does not divide the prompts"
        self.put("train.updates_per_batch", fitting, *by, note=note)

    def put_schedule(self, kind: str, *names: str, least: float = 0.0) -> None:
        """The learning rate's end: `least` of the largest, or all of it where it is constant."""
        constant = kind.startswith("constant")
        note = "" if constant or kind.startswith("cosine") else "a cosine here, to the same end"
        self.put(
            "policy.optimizer.min_lr_ratio",
            1.0 if constant else least,
            *names[: 1 if constant else None],
            note=note,
        )

    def put_warmup(self, name: str, share: float) -> None:
        """A warm-up that is a share of the steps."""
        if share == 0:
            return
        if steps := self.settings.get("train.steps"):
            self.put("policy.optimizer.warmup_steps", round(share * steps[0]), name)
        else:
            self.leave(name, "a share of steps that are not known; set policy.optimizer.warmup_steps")

    def put_lora(self, rank: str, alpha: str) -> None:
        self.put("policy.lora.rank", self.take(rank, int), rank)
        self.put("policy.lora.alpha", self.take(alpha, float), alpha)
        note = "of a mixture of experts: [attention, experts]"
        self.put("policy.lora.targets", ["attention", "mlp"], note=note)

    def finish(self) -> None:
        """Take over what the table says, mark what is to be filled in, and say of all other keys why they are left out."""
        for name, key in self.format.direct.items():
            value = self.take(name, str if key in _TEXTS else int | float)
            if value is not None and key not in self.settings:
                self.put(key, value, name)
        for key, (what, names) in zip(_BY_HAND, self.format.about.items(), strict=True):
            said = [str(self.given[name]) for name in names if self.given.get(name) is not None]
            self._named |= set(names)
            there = f"; there: {', '.join(said)}" if said else ""
            self.settings[key] = (MISSING, _BY_HAND[key].format(**{what: there}))
        self.settings.setdefault("run.name", ("imported", "the run's folder; the same name again resumes"))
        for name in self.given:
            if name not in self._named:
                patterns = self.format.reasons.items()
                unknown = "without effect here" if name in self._taken else "unknown here"
                why = next((why for known, why in patterns if fnmatchcase(name, known)), unknown)
                self.leave(name, why)


def translated(source: Source, *, gpus: int | None = None, origin: str = "") -> str:
    """The YAML of ours. Raises ConfigError where it could not run even with all that is to be filled in."""
    form: Format = import_module(f"gspo_mm.importing.{source.format}").FORMAT
    made = Translation(source, form, gpus=gpus)
    form.translate(made)
    made.finish()
    filled = {key: ["a.tar"] if key == "data.train" else value for key, (value, _) in made.settings.items()}
    try:
        parse_config(_tree(filled), any_world=True)
    except ConfigError as error:
        raise ConfigError(f"{origin} means a run that is refused here: {error}") from None
    return "\n".join(_lines(made, origin)) + "\n"


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _lines(made: Translation, origin: str) -> Iterator[str]:
    yield f"# GSPO, imported from {origin} of {made.format.name}. What is marked FILL IN is to be filled in; what was left out"
    yield "# is listed at the end. Every setting: configs/keys.md"
    tree = _tree(made.settings)
    for section in sorted(tree, key=list(Config.model_fields).index):
        yield ""
        yield f"{section}:"
        yield from _section(tree[section], "  ")
    yield ""
    yield "# Not translated:"
    for said, why in made.left.items():
        yield f"#   {' '.join(said.split())}: {why}"


def _section(tree: dict[str, Any], indent: str) -> Iterator[str]:
    for name, node in sorted(tree.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(node, dict):
            yield f"{indent}{name}:"
            yield from _section(node, indent + "  ")
        else:
            value, comment = node
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).partition("\n")[0]
            yield f"{indent}{name}: {text}" + (f"  # {' '.join(comment.split())}" if comment else "")
