"""A study's file: the options of a comparison, several models, tuning grids, memory budgets."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from membench.config.assignments import base
from membench.config.declare import LARGEST
from membench.config.errors import UserError
from membench.config.settings import Settings, read_toml, resolve
from membench.config.units import parse_memory
from membench.config.values import shortened

Values = dict[str, Any]  # of hyper-parameters
Grid = Mapping[str, Sequence[Any]]  # the values of each to try

_OWN = ("models", "tune", "memory")
_MOST_POINTS, _MOST_TRIALS = 10**15, 10_000
_OF_TUNE = ("budget", "seed", "data")  # besides hyper-parameters


@dataclass(frozen=True)
class Study:
    """What to run. `grids` has the values to try for each method; under an empty name, those for all other methods."""

    settings: tuple[Settings, ...]  # one per model
    grids: Mapping[str, Grid]
    budget: int  # trials of each method on each task; 0: nothing is tuned
    tuning_seed: int  # not one of the seeds that count
    memory_bytes: tuple[int, ...]
    tuning_data: str | None = None  # on which values are chosen, if not on the data that count
    fixed: Mapping[str, Values] = field(default_factory=dict)  # hyper-parameters that the file has by method

    def grid(self, method: str) -> Grid:
        """What is tried of a method; nothing is an empty one."""
        return self.grids.get(self.grid_name(method), {})

    def grid_name(self, method: str) -> str:
        """Under which name `grids` has what is tried of a method."""
        return next((name for name in (method, base(method)) if name in self.grids), "")

    def trials(self, method: str) -> list[Values]:
        """The values for each of a method's trials: its whole grid, or a spread-out part if it exceeds the budget.

        Methods that share a grid try the same part of it. If the budget exceeds the grid, what is left is for values
        `beyond` it.

        Raises:
            UserError: the grid has fewer points than the budget, and nothing beyond them.
        """
        grid = self.grid(method)
        if not grid:
            raise UserError(
                f"{method} has nothing to tune: add tune = {{lr = [...]}} to [{method}], or a [tune] for all methods"
            )
        count = math.prod(map(len, grid.values()))
        if count < self.budget and not any(map(_are_numbers, grid.values())):
            raise UserError(
                f"{method}: its grid has {count} points, but each method is tuned with {self.budget} trials: add "
                "values (of three numbers or more the grid is extended where the best is at its edge), or lower "
                "tune's budget"
            )
        if count > _MOST_POINTS:
            raise UserError(
                f"{method}: its grid has {shortened(count)} points, at most {_MOST_POINTS:,} can be drawn from"
            )
        rng = random.Random(self.grid_name(method))
        return [_point(grid, index) for index in _spread(grid, count, min(count, self.budget), rng)]


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether there are three numbers or more, of which the first and the last are an edge."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(values) and len(set(numbers)) >= 3


def beyond(tried: Sequence[Values], chosen: Values) -> Values | None:
    """The chosen values with the first that is at the edge of what was tried moved one step on; None where none is.

    The step is that between the last two values: their ratio, or their difference if one isn't above 0.
    """
    for key, value in chosen.items():
        values = [point[key] for point in tried]
        if not _are_numbers(values) or value not in (min(values), max(values)):
            continue
        inner, edge = sorted(set(values))[-2:] if value == max(values) else sorted(set(values))[1::-1]
        moved = edge * edge / inner if min(values) > 0 else 2 * edge - inner
        moved = round(moved) if isinstance(edge, int) else float(f"{moved:.6g}")
        if moved not in (edge, 0):
            return {**chosen, key: moved}
    return None


def _point(grid: Grid, index: int) -> Values:
    """The point of that number, in the order of `itertools.product`: the last value changes first."""
    point = {}
    for key, values in reversed(list(grid.items())):
        index, place = divmod(index, len(values))
        point[key] = values[place]
    return {key: point[key] for key in grid}


def _spread(grid: Grid, points: int, count: int, rng: random.Random) -> list[int]:
    """`count` random points: of a hundred draws, the one that covers the most values."""

    def covered(draw: list[int]) -> int:
        return len({f"{key}={value}" for index in draw for key, value in _point(grid, index).items()})

    widest = max((rng.sample(range(points), count) for _ in range(100)), key=covered)
    return sorted(widest)


def load(path: str, given: Mapping[str, Any]) -> Study:
    """Read a study; `given` are options from the command line, which replace the file's.

    Raises:
        UserError: the file can't be read, or has an invalid key or value.
    """
    content = read_toml(path)
    own = {key: content.pop(key) for key in _OWN if key in content}
    tables = {name: table for name, table in content.items() if isinstance(table, dict) and name != "options"}
    grids = {name: _grid(table.pop("tune"), path, f"{name}.tune") for name, table in tables.items() if "tune" in table}
    tune = own.get("tune", {})
    if not isinstance(tune, dict):
        raise UserError(f"{path}: tune must be a table such as {{lr = [1e-4, 1e-3], budget = 2}}, not {tune!r}")
    general = {key: value for key, value in tune.items() if key not in _OF_TUNE}
    grids |= {"": _grid(general, path, "tune")} if general else {}
    settings = _settings(path, content, own.get("models"), given)
    budget = _count(path, "tune.budget", tune.get("budget", 0))
    if budget > _MOST_TRIALS:
        raise UserError(f"{path}: tune.budget must be at most {_MOST_TRIALS}, not {shortened(budget)}")
    if bool(grids) != bool(budget):
        raise UserError(f"{path}: tune needs both values to try and a budget, the number of trials of each method")
    seed = _count(path, "tune.seed", tune.get("seed", _first_free(settings[0].seeds)))
    if budget and seed in settings[0].seeds:
        raise UserError(f"{path}: tune.seed {seed} is one of the seeds that count: choose another")
    data = tune.get("data")
    if data is not None and not (isinstance(data, str) and data.strip()):
        raise UserError(f"{path}: tune.data must be a file or folder in the task's format, not {data!r}")
    study = Study(settings, grids, budget, seed, _memory(path, own.get("memory", [])), data, tables)
    _check_unused(path, study, settings[0], tables)
    return study


def _check_unused(path: str, study: Study, settings: Settings, tables: Mapping[str, Values]) -> None:
    """Raises UserError for what the file gives and the study would pass over."""
    if settings.save is not None:
        raise UserError(f"{path}: save: a study keeps no models; leave it out, and train the best with compare --save")
    for name, table in tables.items():
        both = sorted(table.keys() & study.grid(name).keys())
        if both:
            raise UserError(f"{path}: {name}.{both[0]} has a value and is tuned: give one or the other")


def _settings(path: str, content: Values, models: Any, given: Mapping[str, Any]) -> tuple[Settings, ...]:
    if models is None:
        return (resolve(given, path, content),)
    if not isinstance(models, list) or not models or not all(isinstance(name, str) for name in models):
        raise UserError(f"{path}: models must be a list of models, not {models!r}")
    if "model" in content:
        raise UserError(f"{path}: give either model or models, not both")
    return tuple(resolve({**given, "model": name}, path, content) for name in dict.fromkeys(models))


def _grid(table: Any, path: str, name: str) -> dict[str, list[Any]]:
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name} must be a table such as {{lr = [1e-4, 1e-3]}}, not {table!r}")
    for key, values in table.items():
        if key in _OF_TUNE and name != "tune":
            raise UserError(f"{path}: {name}.{key} must be the same for all methods: move it to [tune]")
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: {name}.{key} must be a list of values to try, not {values!r}")
        for place, value in enumerate(values):
            if value in values[:place]:
                raise UserError(f"{path}: {name}.{key} has {shortened(value)} twice: give each value once")
    return table


def _count(path: str, name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"{path}: {name} must be a whole number of at least 0, not {shortened(value)}")
    if value > LARGEST:
        raise UserError(f"{path}: {name} must be at most {LARGEST}, not {shortened(value)}")
    return value


def _first_free(seeds: Sequence[int]) -> int:
    """The seed after the largest; after the largest that there can be, the first that isn't taken."""
    return 1 + max(seeds) if max(seeds) < LARGEST else min({*range(1 + len(seeds))} - {*seeds})


def _memory(path: str, sizes: Any) -> tuple[int, ...]:
    try:
        return tuple(parse_memory(str(size)) for size in (sizes if isinstance(sizes, list) else [sizes]))
    except ValueError as error:
        raise UserError(f"{path}: memory: {error}") from error


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises UserError if there is no such part."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {text}: write PART/PARTS, such as 2/8")
    return int(number), int(count)
