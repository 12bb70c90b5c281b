"""Waiting for what other processes do."""

import os
import time


def group_is_gone(group):
    """Whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition, seconds):
    """Wait until `condition()` is true, at most so many seconds."""
    for _ in range(100 * seconds):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"waited for {seconds} s")
