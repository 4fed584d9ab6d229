"""Which options of where runs are made go together, and how many of them share a device."""

import os

from membench.config.errors import UserError
from membench.config.options import FanOutOptions


def check(options: FanOutOptions, processes: int) -> None:
    """Raises UserError for options that contradict each other, or that the executor wouldn't use.

    Args:
        options: what was asked for.
        processes: of each run; a device has one of them.
    """
    executor, devices = options.executor, options.devices
    for flag, given, owner in (("--ray-address", options.ray_address, "ray"), ("--slurm", options.slurm, "slurm")):
        if given and executor != owner:
            raise UserError(f"{flag} is for --executor {owner}, not {executor}: give that, or leave {flag} out")
    if options.detach and executor == "local":
        raise UserError("--detach: local runs end with the command that makes them: use --executor ray or slurm")
    if options.detach and executor == "ray" and not options.ray_address:
        raise UserError("--detach needs a cluster that outlives the command: give --ray-address")
    if executor != "local" and options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {options.device}: {executor} chooses the card: give --device cuda")
    if processes > 1 and options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {options.device}: each process has a card of its own: name them with --devices")
    if devices is not None:
        _check_devices(options, devices, processes)


def _check_devices(options: FanOutOptions, devices: tuple[str, ...], processes: int) -> None:
    if options.executor != "local":
        raise UserError(f"--devices is for --executor local; {options.executor} chooses the card: give --device cuda")
    if options.device != "auto":
        raise UserError("give either --device or --devices, not both")
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise UserError(f"--devices {','.join(devices)}: name devices of one kind, whose figures can be compared")
    if devices[0].partition(":")[0] == "cpu" and len(devices) > 1:
        raise UserError(f"--devices {','.join(devices)}: a CPU is one device: leave it out; --jobs makes runs share it")
    if len({name if ":" in name else f"{name}:0" for name in devices}) < len(devices):
        raise UserError(f"--devices {','.join(devices)}: a device is there twice; --jobs makes runs share one")
    if len(devices) % processes:
        raise UserError(f"--devices {','.join(devices)}: name a multiple of {processes}, one for each process of a run")
    room = len(devices) // processes
    if options.jobs and options.jobs > room:
        one = "there is one run per device" if processes == 1 else f"each run takes {processes} devices"
        raise UserError(f"--jobs {options.jobs}: {one}, so at most {room}; leave it out")


def sharing(options: FanOutOptions) -> int:
    """Runs at a time on one device; on another machine, the run itself finds out."""
    return 1 if options.devices or options.executor != "local" else options.jobs or 1


def crowded(options: FanOutOptions, processes: int) -> bool:
    """Whether the runs that are made here at a time have more threads than this machine has processors."""
    processors = os.cpu_count() or 1
    return sharing(options) * processes * (options.threads or processors) > processors
