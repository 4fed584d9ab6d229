"""The folder of a comparison: its records, and the checkpoints and logs of unfinished runs."""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from membench.config.errors import UserError, about_file
from membench.config.run import shards_of
from reports import record

_FINAL = ("ok", "diverged", "out_of_memory")  # results; a run that failed is tried again


class Folder:
    """`PATH/RUN_ID.json`, `PATH/checkpoints/RUN_ID.pt` (with shards in `RUN_ID.shards/`) and `PATH/logs/RUN_ID.log`."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def locked(self, part: str = "", place: str = "", at_once: int = 1) -> Iterator[None]:
        """Keep other processes out while runs are made, or a `part` of them, "-1-of-2": then those that make the same
        part, all, or one of another division. The lock is released when the process ends, however that happens.

        Args:
            part: which.
            place: the device of this machine where it is made; see `runs_beside`.
            at_once: how many runs are made there at a time.

        Raises:
            UserError: another process is using the folder, or it can't be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / f".lock{part}", "a+", opener=_no_link)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--out {about_file(error)}") from error
        with file:
            self._take(file, fcntl.LOCK_EX)
            for path in self._overlapping(part):
                with path.open() as other:
                    self._take(other, fcntl.LOCK_SH)  # and let go: it is only to see whether somebody holds it
            file.truncate(0)
            self._sign(file, f"{_signature(os.getpid())} {at_once} {_here(place)}")
            try:
                yield
            finally:
                file.truncate(0)
                self._remove_empty_folders()

    def _take(self, file: IO[str], how: int) -> None:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {self._in_use(file)} or choose another folder") from error
        except OSError as error:  # some disks of a network have none
            why = f"its disk has no locks ({error.strerror}), which keep two commands apart"
            raise UserError(f"--out {self.path}: {why}: choose a folder on another disk") from error

    def _in_use(self, file: IO[str]) -> str:
        """What to say where another process holds a lock."""
        file.seek(0)
        owner, _, host, *_ = [*file.read().split(" "), "", "", ""]
        where = f" on {host}" if host not in ("", socket.gethostname()) else ""
        return f"{self.path}: process {owner.partition('@')[0] or '?'}{where} is writing there; wait for it"

    def check_idle(self) -> None:
        """Raises UserError while another process makes runs here."""
        for path in self.path.glob(".lock*"):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(self._in_use(file)) from error
                except OSError:  # a disk without locks, where nobody makes runs
                    return

    def _sign(self, file: IO[str], text: str) -> None:
        """Say in a lock whose it is; past the file's buffer, which would be written again when it is closed."""
        try:
            os.write(file.fileno(), text.encode())
        except OSError as error:
            raise UserError(f"--out {about_file(OSError(error.errno, error.strerror, file.name))}") from error

    def _overlapping(self, part: str) -> list[Path]:
        """The locks of others that may make the same runs: all but those of other parts of the same division."""
        _, of, count = part.rpartition("-of-")
        return [
            path
            for path in self.path.glob(".lock*")
            if path.name != f".lock{part}" and not (of and path.name.endswith(of + count))
        ]

    def runs_beside(self, part: str, place: str) -> int:
        """How many runs those who make other parts of the folder make at the same time on the same device."""
        beside = 0
        for path in self.path.glob(".lock-*"):
            owner, at_once, where = [*path.read_text().split(" ", 2), "", ""][:3]
            if path.name != f".lock{part}" and where == _here(place) and _is_alive(owner):
                beside += int(at_once)
        return beside

    def finished(self, run_id: str, *, retry: bool = False) -> dict[str, Any] | None:
        """The record of a run that needn't be made again; with `retry`, only one that is ok.

        Raises:
            UserError: the file with the record's name isn't a record, or is another run's.
        """
        path = self.path / f"{run_id}.json"
        if not path.exists():
            return None
        try:
            found = record.load(path)
        except ValueError as error:
            raise UserError(f"{error} Remove the file to make that run again") from error
        if found["run_id"] != run_id:
            raise UserError(f"{path}: the record of another run, {found['run_id']}. Remove it to make that run again")
        return found if found["status"] in (("ok",) if retry else _FINAL) else None

    def write(self, made: dict[str, Any]) -> None:
        """Keep a record.

        Raises:
            UserError: it can't be written; it says where the record is now.
        """
        try:
            record.write(made, self.path)
        except OSError as error:
            raise UserError(f"--out {about_file(error)}; {self._kept_elsewhere(made)}") from error

    def clear(self, made: dict[str, Any], begun_as: str | None = None) -> None:
        """Delete what only an unfinished run needs, also of the one that it was begun as."""
        if made["status"] in ("ok", "diverged"):
            for run_id in filter(None, (made["run_id"], begun_as)):
                checkpoint = self.checkpoint(run_id)
                checkpoint.unlink(missing_ok=True)
                for half in checkpoint.parent.glob(f".{checkpoint.name}.*"):  # of a process that was killed
                    half.unlink()
                shutil.rmtree(shards_of(checkpoint), ignore_errors=True)
        if made["status"] == "ok":
            self.log(made["run_id"]).unlink(missing_ok=True)

    def _kept_elsewhere(self, made: dict[str, Any]) -> str:
        """Keep the record of a run of hours although its folder takes none; in a new one, since among all users' files
        its name could be somebody's link to another file."""
        try:
            kept = record.write(made, tempfile.mkdtemp(prefix="membench-"))
        except OSError as error:
            return f"its record is lost, since there is no room for it elsewhere either: {about_file(error)}"
        return f"its record is kept in {kept}: move it to {self.path}"

    def _remove_empty_folders(self) -> None:
        for path in (self.checkpoint("").parent, self.log("").parent):
            with suppress(OSError):  # it isn't empty, or doesn't exist
                path.rmdir()

    def checkpoint(self, run_id: str) -> Path:
        """The path of a run's checkpoint."""
        return self.path / "checkpoints" / f"{run_id}.pt"

    def log(self, run_id: str) -> Path:
        """The path of a run's log."""
        return self.path / "logs" / f"{run_id}.log"


def _no_link(path: str, flags: int) -> int:
    """Open a file that is written over, in a folder that may come from somebody else: what a link leads to isn't it."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _here(place: str) -> str:
    """A device of this machine by a name that no other machine has."""
    return f"{socket.gethostname()} {place}"


def _signature(process: int) -> str:
    """A process by its number and when it began, where the system tells: a later one may have the same number."""
    told = _told_of(process)
    return f"{process}@{told[19]}" if told else f"{process}"


def _is_alive(signature: str) -> bool:
    """Whether that process is there, and no zombie that nobody has waited for; to try its lock instead could keep out
    who is about to take it.
    """
    number, _, began = signature.partition("@")
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    told = _told_of(int(number))
    return not told or (told[0] not in "ZX" and began in ("", told[19]))


def _told_of(process: int) -> list[str]:
    """What Linux tells of a process after its name, its state first; nothing where nothing is told."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
