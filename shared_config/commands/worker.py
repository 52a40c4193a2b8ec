"""Runs several command lines in one process, so that a framework is imported once: ``python -m ... FILE``.

FILE holds a JSON list of argument lists. The first that does not succeed ends the process with its status.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(file: str) -> int:
    """Run the command lines of ``file`` in order; 0, or the first other status."""
    from shared_config.cli import main as run

    for arguments in json.loads(Path(file).read_text(encoding="utf-8")):
        status = run(arguments)
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
