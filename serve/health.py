"""Whether a container is well: asked by the Dockerfile's HEALTHCHECK. Standard library only.

0 when the server on SERVE_PORT says that it is well, or when the container does something else and serves nothing; else
1, with a sentence on stderr.
"""

import http.client
import os
import sys
from pathlib import Path

SECONDS = 4


def serves(processes: Path) -> bool:
    """Whether the container's first process is the server, or started it (docker run --init)."""
    for folder in processes.glob("[0-9]*"):
        try:
            status = (folder / "status").read_bytes()
            first = folder.name == "1" or b"\nPPid:\t1\n" in status
            if first and b"serve.py" in (folder / "cmdline").read_bytes():
                return True
        except OSError:  # it ended just now
            continue
    return False


def main(processes: Path = Path("/proc")) -> int:
    """Ask; the exit code."""
    port = int(os.environ.get("SERVE_PORT") or 5000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        if not serves(processes):
            return 0
        print(f"the server on port {port} does not answer ({error})", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if status != 200:
        print(f"the server on port {port} is not well (status {status})", file=sys.stderr)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
