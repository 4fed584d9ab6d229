"""An option is declared once: what the command line, files, records and ids say of it follows from there."""

import json
from dataclasses import dataclass, fields
from typing import Literal

import pytest
import typer
from typer.testing import CliRunner

from membench.cli import app
from membench.commands.options import takes
from membench.commands.plan import PlanOptions
from membench.config.declare import declared, hold_to_bounds, like, option, typed
from membench.config.errors import UserError
from membench.config.options import EvaluationOptions, ExecutionOptions, ReproduceOptions, TrainingOptions
from membench.config.run import Training
from membench.config.settings import Settings, resolve
from reports.schema import OPTIONAL, SCHEMA, training

COMMANDS = {
    "compare": Settings,
    "study": ExecutionOptions,
    "plan": PlanOptions,
    "evaluate": EvaluationOptions,
    "reproduce": ReproduceOptions,
}


@dataclass(frozen=True)
class Oven:
    degrees: int = option(200, "Of Celsius; {default} by default.", at_least=0, below=300)
    mode: Literal["fan", "grill"] = option("fan", "fan or grill.", flags=("--mode", "-m"))
    racks: tuple[int, ...] = option((1, 2), "Such as 1,2.", at_least=1)
    light: bool = option(True, "Inside.", flags=("--light/--dark",))


@dataclass(frozen=True)
class SmallOven:
    degrees: int = like(Oven, "degrees", default=150)


def given_to(owner, arguments: list[str]):
    app, seen = typer.Typer(rich_markup_mode=None), []

    @app.command()
    @takes(owner)
    def bake(dish: str, **given) -> None:
        """Bakes."""
        seen.append((dish, given))

    result = CliRunner().invoke(app, arguments)
    return result.output if result.exit_code or "--help" in arguments else seen[0]


def test_a_field_is_an_option_of_the_command_line_and_only_what_was_given_arrives():
    assert given_to(Oven, ["pie"]) == ("pie", {})
    given = given_to(Oven, ["pie", "--degrees", "180", "-m", "grill", "--racks", "3,4", "--dark"])
    assert given == ("pie", {"degrees": 180, "mode": "grill", "racks": "3,4", "light": False})
    assert typed(Oven, given[1])["racks"] == (3, 4)
    help = " ".join(given_to(Oven, ["--help"]).split())
    assert "Bakes." in help and "--degrees <int> Of Celsius; 200 by default." in help and "--light / --dark" in help


def test_an_option_like_another_differs_in_what_it_says_only():
    assert "Of Celsius; 150 by default." in " ".join(given_to(SmallOven, ["--help"]).split())
    assert SmallOven().degrees == 150
    with pytest.raises(UserError, match="--degrees must be at least 0 and below 300, not 300"):
        hold_to_bounds(SmallOven(300))


@pytest.mark.parametrize(
    ("oven", "message"),
    [
        (Oven(degrees=-1), "--degrees must be at least 0 and below 300, not -1"),
        (Oven(racks=(1, 0)), "--racks must be at least 1, not 0"),
        (Oven(racks=()), "--racks is empty: give at least one"),
    ],
)
def test_bounds_hold_for_a_number_and_for_each_of_a_list(oven, message):
    with pytest.raises(UserError, match=message):
        hold_to_bounds(oven)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_declared_option_is_in_the_help_with_its_words(name):
    help = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
    for one in declared(COMMANDS[name]).values():
        assert all(flag in help for flag in one.flags[0].split("/"))
        assert one.option.help.format(default=one.default) in help


def test_the_defaults_of_all_options_are_within_their_bounds():
    for options in (Settings(), PlanOptions()):
        hold_to_bounds(options)


def test_every_field_of_the_options_is_declared():
    for owner in (Settings, PlanOptions):
        assert {field.name for field in fields(owner)} - {"fit_length"} == set(declared(owner))


def test_a_file_has_the_keys_of_the_command_line(tmp_path):
    settings = {"batch-size": 4, "checkpointing": True, "schedule": "cosine", "seeds": [1, 2], "options": {"a": 1}}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key != "options"]
    (tmp_path / "s.toml").write_text("\n".join([*lines, "[options]", "a = 1"]))
    read = resolve({}, str(tmp_path / "s.toml"))
    assert (read.batch_size, read.checkpointing, read.schedule, read.seeds) == (4, True, "cosine", (1, 2))
    assert read.options == {"a": 1}


def test_the_schema_of_records_has_a_row_for_every_recorded_option_and_no_other():
    rows = {field.path.removeprefix("training.") for field in SCHEMA if field.path.startswith("training.")}
    assert rows == set(Training(steps=1).record)


def test_what_old_records_mean_by_an_option_that_they_lack_is_its_default():
    new = Training(steps=1).record
    later = {field.name for field in SCHEMA if field.path.startswith("training.") and field.null == OPTIONAL}
    assert later and {name: training({"training": {}})[name] for name in later} == {name: new[name] for name in later}


def test_every_option_of_the_training_reaches_it():
    values = {field.name: f"value of {field.name}" for field in fields(TrainingOptions)}
    training = Training.of(TrainingOptions(**values), steps=3, weights="random")
    recorded = {one.option.record_as or name for name, one in declared(Training).items() if one.option.recorded}
    assert set(training.record) == {*recorded, "steps", "weights"}
    assert training.record["gradient_checkpointing"] == "value of checkpointing"


def test_an_option_that_came_later_leaves_the_ids_of_earlier_runs_as_they_are():
    @dataclass(frozen=True, kw_only=True)
    class Later(Training):
        sharpness: float = option(0.5, "Came later.")

    assert Later(steps=1).identity == Training(steps=1).identity
    assert Later(steps=1, sharpness=0.7).identity == {**Training(steps=1).identity, "sharpness": 0.7}
    assert Later(steps=1).record["sharpness"] == 0.5
