"""What an offline run of Weights & Biases has stored; wandb's own reader is no Python."""

import json
import struct
import time

from wandb.proto.wandb_internal_pb2 import Record

# The file is a log in LevelDB's format: blocks of this size, in which each fragment has a header.
BLOCK = 32768
HEADER = struct.Struct("<IHB")
# A fragment is a whole record, or its first, a middle or its last part.
WHOLE = 1
LAST = 4


def history(folder):
    """{name: value} of each call of ``log`` in the one run below ``folder``, which has ended."""
    (file,) = folder.rglob("*.wandb")
    found = records(file)
    # Another process writes the file, and may still do so when ``finish`` returns. Statistics may come after the exit.
    while not any(record.HasField("exit") for record in found):
        time.sleep(0.1)
        found = records(file)
    rows = [record.history.item for record in found if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def records(file):
    """The whole records in ``file``."""
    content = file.read_bytes()
    found = []
    record = b""
    # The file's own header is as long as a fragment's.
    at = HEADER.size
    while at + HEADER.size <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        at += HEADER.size + length
        record += content[at - length : at]
        if kind in (WHOLE, LAST) and at <= len(content):
            found.append(Record.FromString(record))
            record = b""
    return found
