"""Lets accelerate take CPUs for GPUs, because it does not shard on CPUs; as a program, ``as_gpus.py PROGRAM ...``."""

import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

begin = PartialState.__init__


def begin_as_gpus(state, *args, **kwargs):
    begin(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def pretend():
    PartialState.__init__ = begin_as_gpus


if __name__ == "__main__":
    pretend()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert FSDPModule.__subclasses__(), "no module was sharded"
