"""Runs several command lines in one process, so that a framework is imported once: ``python -m ... FILE``.

FILE holds a JSON list of argument lists. The first that does not succeed ends the process with its status. The process
ends with the one that started it: where that is gone, standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

ORPHANED = 143


def main(file: str) -> int:
    """Run the command lines of ``file`` in order; 0, or the first other status."""
    threading.Thread(target=end_with_input, daemon=True).start()
    from shared_config.commands.line import status_of

    for arguments in json.loads(Path(file).read_text(encoding="utf-8")):
        status = status_of(arguments)
        if status != 0:
            return status
    return 0


def end_with_input() -> None:
    """End the process at once where standard input ends."""
    while os.read(0, 1):
        pass
    os._exit(ORPHANED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
