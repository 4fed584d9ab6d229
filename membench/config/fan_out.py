"""Which options of where runs are made go together, and how many of them share a device."""

from membench.config.errors import UserError
from membench.config.options import FanOutOptions


def check(options: FanOutOptions) -> None:
    """Raises UserError for options that contradict each other, or that the executor wouldn't use."""
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
    if devices is not None:
        _check_devices(options, devices)


def _check_devices(options: FanOutOptions, devices: tuple[str, ...]) -> None:
    if options.executor != "local":
        raise UserError(f"--devices is for --executor local; {options.executor} chooses the card: give --device cuda")
    if options.device != "auto":
        raise UserError("give either --device or --devices, not both")
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise UserError(f"--devices {','.join(devices)}: name devices of one kind, whose figures can be compared")
    if len(set(devices)) < len(devices):
        raise UserError(f"--devices {','.join(devices)}: a device is there twice; --jobs makes runs share one")
    if options.jobs and options.jobs > len(devices):
        raise UserError(f"--jobs {options.jobs}: there is one run per device, so at most {len(devices)}; leave it out")


def sharing(options: FanOutOptions) -> int:
    """Runs at a time on one device; on another machine, the run itself finds out."""
    return 1 if options.devices or options.executor != "local" else options.jobs or 1
