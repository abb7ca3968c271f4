"""Runs marval's commands in one process, as users run it: without the tests' checks of shapes and types.

Reads lines of JSON, [folder, arguments, offline], and answers each with [exit code, what was said on standard error].
"""

import contextlib
import io
import json
import os
import socket
import sys
import traceback

from marval.cli import main


def refuse(*given, **options):
    raise AssertionError(f"something was asked of the network: {given}")


connect, resolve = socket.socket.connect, socket.getaddrinfo
for line in sys.stdin:
    folder, arguments, offline = json.loads(line)
    os.chdir(folder)
    socket.socket.connect, socket.getaddrinfo = (refuse, refuse) if offline else (connect, resolve)
    sys.argv = ["marval", *arguments]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, said.getvalue().strip()]), flush=True)
