"""Records and their page as a dataset repository on the Hugging Face hub: `records/`, `report.html` and a card."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from membench.config.errors import UserError
from reports import page, tables
from reports.record import Found

PREFIX = "hub:"
_HEADER = "---\ntags: [membench]\n---\n\n# membench report\n\n"
_HOW = "`records/` has a file a run, which `membench report records` reads; `report.html` is the page.\n\n"


def repository(place: str) -> str:
    """`USER/NAME` of `hub:USER/NAME`. Raises UserError for anything else."""
    name = place.removeprefix(PREFIX)
    if not place.startswith(PREFIX) or len(list(filter(None, name.split("/")))) != 2:
        raise UserError(f"--push {place}: write hub:USER/NAME, the dataset repository to upload to")
    return name


def push(place: str, found: Found, trials: list[dict[str, Any]]) -> str:
    """Upload everything in one commit, to a repository that is made, privately, if there is none; returns its address.

    Raises:
        UserError: the hub can't be reached, or refuses.
    """
    name, api = repository(place), HfApi(endpoint=constants.ENDPOINT)
    operations = [CommitOperationAdd(path, text.encode()) for path, text in _files(found, trials)]
    try:
        made = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        message = f"{len(found.records)} runs of membench"
        api.create_commit(name, operations, commit_message=message, repo_type="dataset")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"--push {place}: {why}") from error
    return str(made)


def _files(found: Found, trials: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for folder, records in (("records", found.records), ("records/tuning", trials)):
        seen: Counter[str] = Counter()
        for one in records:
            name = one["run_id"]
            seen[name] += 1
            again = f"--{seen[name]}" if seen[name] > 1 else ""  # of two with one name the hub would keep the last
            yield f"{folder}/{name}{again}.json", json.dumps(one, indent=1) + "\n"
    yield "report.html", page.render(found.records, found.problems, trials)
    yield "README.md", _HEADER + _HOW + tables.render(found.records, "markdown", trials=trials) + "\n"
