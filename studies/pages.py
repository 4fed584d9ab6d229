"""The pages of the studies in docs/studies, each made from its records and its words, and nothing else."""

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from reports import figures, formats, tables
from reports.figures import svg
from reports.figures.svg import Plot
from reports.record import Record
from reports.rows import have_average
from reports.setups import group, heading
from reports.studies import recommend, sensitivity_section
from studies import gradients, rates, seeds
from studies.records import unpack

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "docs" / "studies"
SHOWN = ("summary", "memory", "quality")  # of the tables: times of runs made side by side tell nothing


class Study(NamedTuple):
    """A folder below this one."""

    name: str
    words: dict[str, Any]  # title, asked, made, limits; plots: names of charts; output: the file of a command's;
    # default_rates: it compares rates
    finals: list[Record]
    trials: list[Record]


def all_studies() -> list[Study]:
    """Those that have words; some may have no records yet."""
    return [_load(path.parent) for path in sorted(HERE.glob("*/words.toml"))]


def _load(folder: Path) -> Study:
    words = tomllib.loads((folder / "words.toml").read_text(encoding="utf-8"))
    words = {key: value.strip() if isinstance(value, str) else value for key, value in words.items()}
    return Study(folder.name, words, unpack(folder / "records.json"), unpack(folder / "trials.json"))


def page(study: Study) -> str:
    """A study's page."""
    words = study.words
    head = f"<!-- Generated from studies/{study.name} by `make studies`; edit that. -->\n\n# {words['title']}"
    if not study.finals:
        return f"{head}\n\n{words['asked']}\n\nNot made yet: studies/{study.name} has the study file.\n"
    if "output" in words:
        printed = (HERE / study.name / words["output"]).read_text(encoding="utf-8").rstrip()
        return _joined(study, [head, _asked(study), f"## What it printed\n\n```text\n{printed}\n```"])
    if "default_rates" in words:
        compared = rates.scores(study.finals)
        told = formats.markdown([(["The rates"], [rates.table(compared)], [])])
        return _joined(study, [head, _asked(study), f"## The answer\n\n{rates.answer(compared)}", told])
    found = gradients.levels(study.finals)
    answer = gradients.answer(found) if found else recommend(study.finals, words.get("memory_bytes", []))
    told = "\n\n".join([*study.words.get("findings", []), *answer, *([] if found else _survivals(study.finals))])
    return _joined(study, [head, _asked(study), f"## The answer\n\n{told}", *_figures(study)])


def _survivals(finals: list[Record]) -> list[str]:
    """Of each set-up, whose scores have nothing to do with another's."""
    setups = group(finals)
    told = {
        setup: seeds.survival([run for of_row in setup.rows.values() for run in of_row.values()])
        for setup in setups
        if len(setup.tasks) == 1 or have_average([setup], setup.tasks)
    }
    return [
        f"{'; '.join(heading(setup))}: {words}" if len(setups) > 1 else words for setup, words in told.items() if words
    ]


def _asked(study: Study) -> str:
    return f"## What was asked\n\n{study.words['asked']}"


def _joined(study: Study, parts: list[str]) -> str:
    limits = "\n".join(f"- {limit}" for limit in study.words["limits"])
    last = [
        f"## What this doesn't show\n\n{limits}",
        f"## Made with\n\n{study.words['made']}\n\nThe records are in `studies/{study.name}`: `membench report "
        f"studies/{study.name}/records.json` prints them.",
    ]
    return "\n\n".join([*parts, *last]) + "\n"


def _figures(study: Study) -> list[str]:
    sections: list[formats.Section] = []
    drawn = draw(study)
    plots = "\n\n".join(_shown(words if len(drawn) > 1 else "", files) for words, files in drawn.items())
    if found := gradients.levels(study.finals):
        sections.append((["The full gradient"], [gradients.table(found)], []))
    if study.trials:
        sections.append(sensitivity_section(study.trials, study.finals))
    told = [formats.markdown(sections)] if sections else []
    return [plots, *told, tables.render(study.finals, "markdown", SHOWN)]


def draw(study: Study) -> dict[str, dict[str, Plot]]:
    """Its plots by file, for each set-up in words: those of `reports.figures` that its words name, and the gradients'
    norms where they were tracked."""
    wanted = [chart for chart in figures.CHARTS if chart.name in study.words.get("plots", [])]
    found: dict[str, dict[str, Plot]] = {}
    for number, setup in enumerate(group(study.finals), 1):
        plots = [plot for chart in wanted for plot in chart.draw(setup, alone=True)]
        found.setdefault(heading(setup)[0], {}).update({_file(study, plot, number): plot for plot in plots})
    tracked = {_file(study, plot): plot for plot in gradients.draw(study.finals)}
    return {words: files for words, files in {**found, "norms of the gradient": tracked}.items() if files}


def _shown(words: str, files: dict[str, Plot]) -> str:
    lines = [f"![{plot.title}]({file})" for file, plot in files.items()]
    return "\n".join([f"{words}:\n", *lines] if words else lines)


def _file(study: Study, plot: Plot, number: int = 1) -> str:
    return f"{study.name}-{plot.name}{f'-{number}' if number > 1 else ''}.svg"


def stale() -> list[Path]:
    """The pages that aren't what their studies say."""
    made = {PAGES / f"{study.name}.md": page(study) for study in all_studies()}
    return [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def write() -> list[Path]:
    """Write the pages that are stale; returns these."""
    PAGES.mkdir(parents=True, exist_ok=True)
    changed = stale()
    for study in all_studies():
        (PAGES / f"{study.name}.md").write_text(page(study), encoding="utf-8")
        for file, plot in (item for files in draw(study).values() for item in files.items()):
            (PAGES / file).write_text(svg.standalone(plot), encoding="utf-8")
    return changed
