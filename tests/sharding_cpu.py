"""Accelerate shards on accelerators alone, and ignores FSDP on CPUs; this makes it shard there, by FSDP2 on gloo.

`torchrun sharding_cpu.py SCRIPT ...` runs a script so.
"""

import contextlib
import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState


@contextlib.contextmanager
def accelerate_shards_on_cpu():
    """Within this context accelerate takes the processes for ones that it can shard a model over."""
    init = PartialState.__init__

    def pretend(self, *args, **given):
        init(self, *args, **given)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU  # what it looks at; the device stays a CPU

    PartialState.__init__ = pretend
    try:
        yield
    finally:
        PartialState.__init__ = init


def forget():
    """What accelerate knows of this process, which is forked from one that isn't part of a group."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with accelerate_shards_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
