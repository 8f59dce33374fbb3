"""Runs a command line and prints, after its output, its wall time and peak memory as a line of JSON.

A script that imports next to nothing, run in a process of its own: Linux takes the memory of the
process that starts another as the other's, too, until it is loaded.
"""

import json
import os
import sys
import time

# an installed program has its bytecode, whatever whoever measures has set
environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
begin = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], environment)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - begin
status = os.waitstatus_to_exitcode(status)
figures = {"seconds": seconds, "peak_bytes": usage.ru_maxrss << 10, "status": status}
print("\n" + json.dumps(figures), end="")
