"""Errors of a program as one line on stderr, for any number of processes."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, TCPStore

from modeling_sslam.common.signals import INTERRUPTED

# Time that a failed process spends on finding the reason of another process.
LONGEST_LOOK = timedelta(seconds=5)
_LOST_CONTACT = (
    "Another process of this launch ended without giving a reason; it may have been killed for lack of memory. "
    "Start again; a run continues from its last checkpoint with --resume auto."
)


@contextmanager
def reported(*errors: type[Exception]) -> Iterator[None]:
    """End the program with one line if the body raises one of `errors`, or if a file, data worker or process fails.

    Of several processes the first that fails prints the line. The others end without a word, also if the failure of
    the first one broke their communication. Launchers that start from torchrun repeat the line in their summary.
    """
    try:
        yield
    except errors as error:
        _end(_one_line(error))
    except OSError as error:
        _end(f"A file could not be read or written: {_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except RuntimeError as error:
        text = _one_line(error)
        if text.startswith("DataLoader worker"):  # torch raises no class of its own
            _end(
                f"A data worker was lost: {text} If it was killed for lack of memory, lower data.num_workers or "
                "data.shuffle_buffer."
            )
        if torch.distributed.is_initialized():
            if (reason := _first_failure(None)) is not None:
                _end(reason)
            if isinstance(error, DistError) or "gloo" in text:
                _end(_LOST_CONTACT)
        _record(f"{type(error).__name__}: {text}")
        raise
    except Exception as error:
        _record(f"{type(error).__name__}: {_one_line(error)}")
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _end(reason: str) -> None:
    """End this process, with a line if it is the first of the launch that failed."""
    sys.exit(f"error: {reason}" if _record(reason) is reason else 1)


def _record(reason: str) -> str:
    """Tell the other processes and the launcher why this one ends. Return why the first one ended."""
    first = _first_failure(reason) or reason
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun's format. Its summary at the end of the output shows the message.
        content = {"message": {"message": first, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
    return first


def _first_failure(reason: str | None) -> str | None:
    """Return the reason of the first process of this launch that failed.

    Args:
        reason: The reason of this process, recorded if it is the first; `None` to ask without recording.
    """
    if not torch.distributed.is_initialized():
        return reason
    key = f"failure-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=LONGEST_LOOK)
        if reason is not None and store.add(f"{key}-count", 1) == 1:
            store.set(key, reason)
            return reason
        if reason is None and not store.check([f"{key}-count"]):
            return None
        return store.get(key).decode()
    except (RuntimeError, KeyError):  # the process that keeps the store has ended
        return reason
