"""The stream that commands print their results to."""

import codecs
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

STDOUT, STDERR = 1, 2


def _escape_for_json(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks by their escapes in JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("jsonescape", _escape_for_json)


@contextmanager
def results_stream(is_json: bool = False) -> Iterator[TextIO]:
    """Open a stream to the standard output that libraries cannot write to.

    libsndfile prints to the standard output when some files are damaged. Until the stream is closed, the
    libraries' output goes to stderr.

    Args:
        is_json: Whether characters that the output's encoding lacks are escaped as in JSON.
    """
    try:
        is_process_stdout = sys.stdout.fileno() == STDOUT
    except (OSError, ValueError):  # the stream is no file, as in tests and notebooks
        is_process_stdout = False
    if not is_process_stdout:
        yield sys.stdout
        return
    sys.stdout.flush()
    errors = "jsonescape" if is_json else "backslashreplace"
    results = os.fdopen(os.dup(STDOUT), "w", encoding=sys.stdout.encoding, errors=errors)
    os.dup2(STDERR, STDOUT)
    try:
        yield results
        results.flush()
    finally:
        if os.name == "posix":
            # C buffers the libraries' output. Without this flush the buffer would be written to the results.
            ctypes.CDLL(None).fflush(None)
        os.dup2(results.fileno(), STDOUT)
        with suppress(BrokenPipeError):  # the write that met the closed pipe has raised it already
            results.close()
