"""Lets accelerate take CPUs for GPUs, because it would not shard on CPUs; as a program it runs another one so."""

import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__


def begin_as_gpus(state, *args, **kwargs):
    begin(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_gpus

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
