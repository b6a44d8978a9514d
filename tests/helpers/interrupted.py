"""Ctrl-C at a line of dynrank."""

import signal
import sys
from pathlib import Path

import dynrank


def interrupted(call, at, below=""):
    """(whether Ctrl-C at line ``at`` has ended ``call``, how many lines ran), counted in this folder of dynrank."""
    sources = str(Path(dynrank.__file__).parent / below)
    outer = sys.gettrace()
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(sources):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True, lines
    finally:
        sys.settrace(outer)
    return False, lines
