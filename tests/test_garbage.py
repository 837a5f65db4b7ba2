"""What a server keeps out of Python's search for garbage while it runs."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import atexit, gc
atexit.register(lambda: print("at the end", gc.get_freeze_count()))
from cloc_mllm.garbage import keep_what_is_loaded
keep_what_is_loaded()
assert gc.get_freeze_count() > 1000
"""


def test_what_is_kept_is_let_go_when_python_ends() -> None:
    """Else libraries made with nanobind print what they hold as leaks after each Ctrl-C."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("at the end 0\n", "")
