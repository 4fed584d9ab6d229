"""`python -m studies` makes the pages, `python -m studies stale` says which aren't up to date (exit 1), and
`python -m studies pack NAME FOLDER...` takes the records of finished runs into studies/NAME."""

import sys
from pathlib import Path

from studies import pages
from studies.records import pack


def main(arguments: list[str]) -> int:
    """The exit code."""
    match arguments:
        case []:
            print("\n".join(f"written: {path.name}" for path in pages.write()) or "nothing is stale")
        case ["stale"]:
            found = pages.stale()
            print("\n".join(f"stale: {path.name}, run `make studies`" for path in found) or "nothing is stale")
            return 1 if found else 0
        case ["pack", name, *folders] if folders:
            place = pages.HERE / name
            print(pack(list(map(Path, folders)), place / "records.json"))
            tuning = [Path(folder) / "tuning" for folder in folders if (Path(folder) / "tuning").is_dir()]
            if tuning:
                print(pack(tuning, place / "trials.json", points=1))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
