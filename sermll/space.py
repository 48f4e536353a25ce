"""The space of a search: which settings a trial chooses, and from what. What it chooses becomes overrides.

    space:
      optim.lr: {loguniform: [1.0e-5, 1.0e-2]}
      model.pool.kind: {choice: [flam, mean]}
      model.pool.heads: {choice: [4, 8, 16], when: {model.pool.kind: flam}}
      mixup.snr_db: {range: [-15, 20]}
      weights: {simplex: [losses.kl.weight, losses.focal.weight, losses.supcon.weight], sum: 1.0}

`losses.supcon: {choice: [null, {}]}` turns a section off, or leaves it as the experiment has it, with its defaults if
it has none. A setting of a section that is off in a trial is not chosen, and a simplex is that of the weights left.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from sermll.config import Experiment, Section, flatten, resolve, with_overrides
from sermll.errors import ConfigError

OUTSIDE = ("name", "seed", "fold", "data.path", "data.labels", "data.targets", "protocol", "resources", "tracking")
"""What a trial cannot choose: it decides what is asked, or on which machines, not how well it is answered."""
TRIED, LISTED = 64, 1000
"""Points of a space that are validated before anything starts: at random, and of all combinations at most so many."""
LEAST_SHARE = 1e-3
"""Smallest share of a weight on a simplex: a loss that is on has a weight."""
Pair = tuple[float, float]


class Chooser(Protocol):
    """What suggests values: an Optuna trial, or anything that has these two methods of it."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number within [low, high]."""
        ...

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number within [low, high]."""
        ...

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """One of the choices."""
        ...


class Choice(Section):
    """What one entry of a space chooses; one of its kinds is given."""

    model_config = ConfigDict(serialize_by_alias=True)

    uniform: Pair | None = Field(default=None, description="a number, evenly between two")
    loguniform: Pair | None = Field(default=None, description="a number, its logarithm evenly between those of two")
    whole: tuple[int, int] | None = Field(default=None, alias="int", description="a whole number between two, both in")
    choice: tuple[Any, ...] | None = Field(default=None, description="one of several values of any kind")
    range: Pair | None = Field(default=None, description="a pair low < high within two bounds")
    simplex: tuple[str, ...] | None = Field(
        default=None, description="the keys of weights, all positive, that have one sum; the entry's name is free"
    )
    sum: float | None = Field(default=None, gt=0, description="of the weights of a simplex; 1 if it is not given")
    when: dict[str, Any] = Field(default={}, description="values of other settings with which alone it is chosen")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len(self.kinds) != 1:
            known = "uniform, loguniform, int, choice, range, simplex"
            raise ValueError(f"give one of {known}, found {', '.join(self.kinds) or 'none'}")
        for pair in (self.uniform, self.loguniform, self.whole, self.range):
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(f"low < high must hold, found {list(pair)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs a low above 0, found {self.loguniform[0]}")
        for name, least in (("choice", self.choice), ("simplex", self.simplex)):
            if least is not None and len({json.dumps(value, sort_keys=True) for value in least}) < max(2, len(least)):
                raise ValueError(f"{name} needs two values at least, each once, found {list(least)}")
        if self.sum is not None and self.simplex is None:
            raise ValueError("sum has no effect without simplex")
        return self

    @property
    def kinds(self) -> list[str]:
        """The kinds that are given, as they are written."""
        given = {
            "uniform": self.uniform,
            "loguniform": self.loguniform,
            "int": self.whole,
            "choice": self.choice,
            "range": self.range,
            "simplex": self.simplex,
        }
        return [kind for kind, value in given.items() if value is not None]

    def keys(self, name: str) -> tuple[str, ...]:
        """The settings that the entry called `name` sets."""
        return self.simplex or (name,)

    def words(self) -> str:
        """For people."""
        when = "".join(f", with {key}={value}" for key, value in self.when.items())
        if self.choice is not None:
            return ", ".join("off" if value is None else _word(value) for value in self.choice) + when
        if self.simplex is not None:
            return f"weights of sum {self.sum or 1.0:g}{when}"
        pair = self.uniform or self.loguniform or self.whole or self.range
        assert pair is not None
        kind = "range within" if self.range else "log" if self.loguniform else ""
        return f"{kind} {pair[0]:g} to {pair[1]:g}{when}".strip()

    def suggest(self, name: str, keys: Sequence[str], trial: Chooser) -> dict[str, Any]:
        """Let a trial choose the values of `keys`, those of its settings that apply: overrides."""
        if self.uniform is not None:
            return {name: trial.suggest_float(name, *self.uniform)}
        if self.loguniform is not None:
            return {name: trial.suggest_float(name, *self.loguniform, log=True)}
        if self.whole is not None:
            return {name: trial.suggest_int(name, *self.whole)}
        if self.choice is not None:
            return {name: json.loads(trial.suggest_categorical(name, [_text(value) for value in self.choice]))}
        if self.range is not None:
            # The upper end as a share of what is left above the lower one: every pair is low < high and is there once.
            low, high = self.range
            start = trial.suggest_float(f"{name}.low", low, high)
            share = trial.suggest_float(f"{name}.share", LEAST_SHARE, 1.0)
            start = min(start, high - LEAST_SHARE * (high - low))
            return {name: [start, start + share * (high - start)]}
        assert self.simplex is not None
        # Exponential variables, scaled to one sum, are evenly spread over the simplex.
        if len(keys) == 1:
            return {keys[0]: self.sum or 1.0}
        parts = [-math.log(trial.suggest_float(f"{key}.part", LEAST_SHARE, 1 - LEAST_SHARE)) for key in keys]
        return {key: (self.sum or 1.0) * part / math.fsum(parts) for key, part in zip(keys, parts, strict=True)}

    def params(self, name: str, keys: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a trial would have had to choose to come to `settings` (dotted keys); None where it cannot.

        `keys` are those of its settings that apply.
        """
        values = [settings.get(key) for key in keys]
        if self.choice is not None:
            texts = [_text(value) for value in self.choice]
            held = _text(settings[name]) if name in settings else _text(_section(settings, name))
            return {name: held} if held in texts else None
        if self.range is not None:
            (low, high), pair = self.range, values[0]
            if not isinstance(pair, list | tuple) or not low <= pair[0] < pair[1] <= high:
                return None
            share = (pair[1] - pair[0]) / (high - pair[0])
            return {f"{name}.low": pair[0], f"{name}.share": share} if share >= LEAST_SHARE else None
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) < len(values):
            return None  # "auto" is no number
        if self.simplex is not None:
            total = math.fsum(numbers)
            if not math.isclose(total, self.sum or 1.0, rel_tol=1e-6) or min(numbers) <= 0:
                return None
            if len(keys) == 1:
                return {}
            parts = [math.exp(-len(numbers) * value / total) for value in numbers]
            inside = all(LEAST_SHARE <= part <= 1 - LEAST_SHARE for part in parts)
            return {f"{key}.part": part for key, part in zip(keys, parts, strict=True)} if inside else None
        pair = self.uniform or self.loguniform or self.whole
        assert pair is not None
        return {name: numbers[0]} if pair[0] <= numbers[0] <= pair[1] else None


def suggest(space: Mapping[str, Choice], tree: Mapping[str, Any], trial: Chooser) -> dict[str, Any]:
    """Let a trial choose its overrides.

    Args:
        space: what is to be chosen.
        tree: the settings of the experiment, as JSON.
        trial: chooses.
    """
    overrides: dict[str, Any] = {}
    for name, choice in _ordered(space):
        keys = _applying(choice, name, with_overrides(tree, overrides))
        if keys:
            overrides |= as_meant(tree, choice.suggest(name, keys, trial))
    return overrides


def as_meant(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides without {} for a section that is on in `tree`: here it means the section as it is."""
    return {key: value for key, value in overrides.items() if value != {} or _lookup(tree, key)[1] is None}


def params_of(space: Mapping[str, Choice], tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial chooses that comes to the settings of `tree`, as far as they lie in the space."""
    settings, params = flatten(tree), {}
    for name, choice in _ordered(space):
        keys = _applying(choice, name, tree)
        if keys:
            params |= choice.params(name, keys, settings) or {}
    return params


def conditional(space: Mapping[str, Choice], tree: Mapping[str, Any]) -> tuple[str, ...]:
    """What some trials choose and others do not: a setting's name, a range's ends, a weight's part of a simplex.

    Args:
        space: what is to be chosen.
        tree: the settings of the experiment, as JSON.
    """
    asked = []
    for chooser in _choosers(space):
        suggest(space, tree, chooser)
        asked.append(chooser.asked)
    return tuple(sorted(set.union(*asked) - set.intersection(*asked)))


def settings_of(space: Mapping[str, Choice], experiment: Experiment) -> dict[str, Any]:
    """The values of the space's settings in an experiment; None for what is off, left out what does not apply."""
    tree = experiment.model_dump(mode="json")
    found = {}
    for name, choice in space.items():
        for key in choice.keys(name):
            held, value = _lookup(tree, key)
            if held:
                found[key] = "on" if isinstance(value, dict) else value
    return found


def check(space: Mapping[str, Choice], tree: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> None:
    """Refuse a space whose points are not all valid experiments.

    Args:
        space: to be looked at, by its ends and by points drawn from it.
        tree: the experiment's settings.
        overrides: of every trial.
        source: the file, for the message.

    Raises:
        ConfigError: naming the first setting or point that is not valid.
    """
    if not space:
        raise ConfigError(f"{source}: the space is empty; there is nothing to search")
    owner: dict[str, str] = dict.fromkeys(overrides, "overrides")
    for name, choice in space.items():
        for key in choice.keys(name):
            if key.split(".")[0] in OUTSIDE or any(key == one or key.startswith(f"{one}.") for one in OUTSIDE):
                raise ConfigError(
                    f"{source}: space.{name}: a trial cannot choose {key}, which decides what is asked or on which "
                    "machines; set it under overrides"
                )
            if key in owner:
                raise ConfigError(f"{source}: space.{name} sets {key}, and so does {owner[key]}")
            owner[key] = f"space.{name}"
    try:
        _ordered(space)
    except CycleError as error:
        raise ConfigError(f"{source}: {' -> '.join(error.args[1])}: entries wait for each other by `when`") from None
    chosen: set[str] = set()
    everything = resolve(tree, {}, source).model_dump(mode="json")
    for point in points(space, everything):
        chosen |= set(point)
        try:
            resolve(tree, point, source)
        except ConfigError as error:
            said = ", ".join(f"{key}={value}" for key, value in point.items())
            raise ConfigError(f"{error}\nSuch a trial would be asked of the space: {said}") from None
    silent = sorted(key for name, choice in space.items() for key in choice.keys(name) if key not in chosen)
    if silent:
        raise ConfigError(
            f"{source}: {', '.join(silent)} would never be chosen: the section is off, or `when` never holds"
        )


def points(space: Mapping[str, Choice], tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Overrides by which a space is looked at.

    Each value of a choice, each whole number, and the ends of what else is chosen; all combinations of choices and
    whole numbers, or the first LISTED of more; and points drawn at random.

    Args:
        space: what is to be chosen.
        tree: the settings of the experiment, as JSON.
    """
    return (suggest(space, tree, chooser) for chooser in _choosers(space))


def _choosers(space: Mapping[str, Choice]) -> "Iterator[Drawn]":
    for name, choice in space.items():
        low, high = choice.whole or (1, len(choice.choice or (1, 2)))
        yield from (Placed(name, place) for place in np.linspace(0, 1, min(high - low + 1, LISTED)).tolist())
    for top in (False, True):
        yield from _combined(top)
    yield from (Drawn(np.random.default_rng([0, number])) for number in range(TRIED))


def _combined(top: bool) -> "Iterator[Listed]":
    """Choosers of one combination after the other, each to be used before the next is asked for."""
    places: list[int] = []
    for _ in range(LISTED):
        chooser = Listed(places, top)
        yield chooser
        onward = [at for at, (place, size) in enumerate(chooser.listed) if place + 1 < size]
        if not onward:
            return
        places = [place for place, _ in chooser.listed[: onward[-1] + 1]]
        places[-1] += 1


class Drawn:
    """Chooses at random."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self.asked: set[str] = set()
        """What was to be chosen."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number within [low, high]."""
        self.asked.add(name)
        if log:
            return float(np.exp(self._generator.uniform(math.log(low), math.log(high))).clip(low, high))
        return float(self._generator.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number within [low, high]."""
        self.asked.add(name)
        return int(self._generator.integers(low, high, endpoint=True))

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """One of the choices."""
        self.asked.add(name)
        return choices[int(self._generator.integers(len(choices)))]


class Placed(Drawn):
    """Chooses for one entry by the place between its first or lowest value, 0, and its last, 1; others at random."""

    def __init__(self, entry: str, place: float) -> None:
        super().__init__(np.random.default_rng(0))
        self._entry, self._place = entry, place

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """What is at the place, if it is the entry's or a part of it."""
        drawn = super().suggest_float(name, low, high, log=log)
        if name == self._entry or name.rpartition(".")[0] == self._entry:
            return high if self._place == 1 else low + self._place * (high - low)
        return drawn

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """The whole number at the place, if it is the entry's."""
        drawn = super().suggest_int(name, low, high)
        return low + round(self._place * (high - low)) if name == self._entry else drawn

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """The choice at the place, if it is the entry's."""
        drawn = super().suggest_categorical(name, choices)
        return choices[round(self._place * (len(choices) - 1))] if name == self._entry else drawn


class Listed(Drawn):
    """Chooses whole numbers and choices by places in a list, the first value where it ends; else an end."""

    def __init__(self, places: Sequence[int], top: bool) -> None:
        super().__init__(np.random.default_rng(0))
        self._places, self._top = places, top
        self.listed: list[tuple[int, int]] = []
        """The places that were taken, and of how many."""

    def _take(self, size: int) -> int:
        at = len(self.listed)
        self.listed.append((self._places[at] if at < len(self._places) else 0, size))
        return self.listed[-1][0]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """The lowest, or the highest."""
        self.asked.add(name)
        return high if self._top else low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """The whole number at the list's next place."""
        self.asked.add(name)
        return low + self._take(high - low + 1)

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        """The choice at the list's next place."""
        self.asked.add(name)
        return choices[self._take(len(choices))]


def _ordered(space: Mapping[str, Choice]) -> list[tuple[str, Choice]]:
    """Sections before their settings, and what others wait for before them."""
    owner = {key: name for name, choice in space.items() for key in choice.keys(name)}
    before: dict[str, set[str]] = {}
    for name, choice in space.items():
        above = {section for key in choice.keys(name) for section in _sections(key)}
        awaited = {part for key in choice.when for part in (key, *_sections(key))}
        before[name] = {owner[key] for key in above | awaited if key in owner}
    return [(name, space[name]) for name in TopologicalSorter(before).static_order()]


def _sections(key: str) -> list[str]:
    """The sections that a setting is in, the outermost first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _applying(choice: Choice, name: str, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of an entry's settings that a trial has to choose: their sections are on, and `when` holds."""

    def holds(key: str, value: Any) -> bool:
        found = _lookup(tree, key)[1]
        return found == value or (value == {} and isinstance(found, Mapping))

    if not all(holds(key, value) for key, value in choice.when.items()):
        return ()
    return tuple(
        key for key in choice.keys(name) if all(_lookup(tree, section)[1] is not None for section in _sections(key))
    )


def _lookup(tree: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Whether the key applies, and its value; None for a section that is off and all that is in it."""
    value: Any = tree
    for part in key.split("."):
        if value is None:
            return True, None
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _section(settings: Mapping[str, Any], name: str) -> Any:
    """{} for a section that is on, as a choice between null and {} names it."""
    return {} if any(key.startswith(f"{name}.") for key in settings) else None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _word(value: Any) -> str:
    return "on" if value == {} else value if isinstance(value, str) else json.dumps(value)
