"""Measures one thing with one backend: ``python -m ... BACKEND REQUEST RESULT``, two files of JSON.

It ends with the process that started it: where that is gone, standard input ends.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from shared_config.bench.measure import Request, measured
from shared_config.bench.result import FOREIGN
from shared_config.commands.backends import backend_module
from shared_config.commands.line import USER_ERROR, message_of
from shared_config.commands.processes import MESSAGE
from shared_config.commands.worker import end_with_input
from shared_config.errors import UserError


def main(backend: str, file: str, result: str) -> int:
    """Do what is asked for; 0, or 2 after a message."""
    threading.Thread(target=end_with_input, daemon=True).start()
    request = Request.from_json(json.loads(Path(file).read_text(encoding="utf-8")))
    try:
        module = backend_module(backend, "bench")
        machine = (module.Foreign if request.of == FOREIGN else module.Machine)(request.device)
        Path(result).write_text(json.dumps(measured(machine, request).to_json()), encoding="utf-8")
    except UserError as error:
        for line in message_of(error).splitlines():
            print(f"{MESSAGE}{line}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
