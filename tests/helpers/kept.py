"""Checkpoints of moments inside of a command's run, which keeps only its last one."""

import shutil
from pathlib import Path

from dynrank.callbacks.lightning import adapter_checkpoint


def keep_checkpoints(folder, replace=setattr):
    """Leave step=N.ckpt in ``folder`` of each checkpoint that this process writes; ``replace`` is as ``setattr``."""
    write = adapter_checkpoint.write_checkpoint

    def write_both(checkpoint, path):
        write(checkpoint, path)
        shutil.copy(path, Path(folder, f"step={checkpoint['global_step']}.ckpt"))

    replace(adapter_checkpoint, "write_checkpoint", write_both)
