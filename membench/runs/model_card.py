"""The model card of a saved model, `README.md` in its folder: what it is, how it was trained, its scores."""

import json
from typing import Any

import membench
from reports.formats import markdown_text
from reports.names import batch_text, counted, printable
from reports.table import mib

# as tasks.models.loading.FOLDER, which comes with transformers: the process that waits for runs doesn't load that
OF_FOLDER = "sha256:"


def card(made: dict[str, Any]) -> str:
    """The card in Markdown, with a header for the hub.

    Args:
        made: the record of the run that trained the model.
    """
    training, environment = made["training"], made["environment"]
    rows = {
        "task": made["task"],
        "model before": f"{made['model']}, {training['weights']} weights",
        "method": made["method"],
        "hyper-parameters": ", ".join(f"{key}={value!r}" for key, value in made["hyperparameters"].items()),
        "training": f"{counted(training['steps'], 'step')} of "
        f"{batch_text(training['batch_size'], training['sequence_length'], made['task'])}, "
        f"{training['dtype']}, {training['schedule']} schedule, seed {made['seed']}",
        "data": training["data"],
        **{f"{name} (validation)": f"{value:.4g}" for name, value in (made["metrics"] or {}).items()},
        "peak memory of training": f"{mib(made['memory']['peak_allocated_bytes'])} MiB",
        "made by": f"membench {membench.__version__}, run {made['run_id']}, {environment.get('created', 'no date')}",
    }
    table = "\n".join(f"| {_shown(key)} | {_shown(value)} |" for key, value in rows.items())
    title = _shown(f"{made['model']} after {made['method']} on {made['task']}")
    return f"---\n{_header(made)}---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n"


def _header(made: dict[str, Any]) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "tags": ["membench", made["method"]]}
    if made["training"]["weights"] == "pretrained" and not _is_local(made["environment"].get("model_revision")):
        fields["base_model"] = made["model"].partition("@")[0]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())  # JSON is YAML, too


def _is_local(revision: str | None) -> bool:
    """Of a folder or a package, whatever its name looks like, or of an unknown place: not the hub's."""
    return revision is None or revision.startswith(OF_FOLDER)


def _shown(text: str) -> str:
    return markdown_text(printable(text))
