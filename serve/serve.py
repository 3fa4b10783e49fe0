"""Serve a model over HTTP as OpenAI's clients expect it, and the console, on one port.

python serve/serve.py --help        every setting
Prints one JSON object on stdout when it is ready: {"url", "models"}. Without a model it needs no torch.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llmops.console import log, print_json, run_main, stdout_to_stderr
from llmops.imports import quick_imports
from llmops.machine import devices
from serve.settings import Settings, read_settings

if TYPE_CHECKING:
    from serve.model.service import Service


def open_model(settings: Settings) -> "Service | None":
    """The model behind its engine, ready to answer; None without one."""
    if settings.model is None:
        return None
    devices.tune_cpu()
    with stdout_to_stderr():
        with quick_imports():
            from serve.model.service import open_service

        return open_service(settings.model, settings.limits, settings.feedback)


def run(settings: Settings) -> int:
    """Serve until a signal says that it is enough; the exit code."""
    from serve.app import build_app
    from serve.server import Server, bound, with_files_for

    settings = replace(settings, access=with_files_for(settings.access))
    listener = bound(settings.access)
    model = open_model(settings)
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url, token, kept = f"http://{shown}:{port}", settings.access.token, settings.access.token_place

    def ready() -> None:
        if kept:  # logs are read by more people than the token is for
            log(f"serving on {host} port {port}; open {url}/?token=TOKEN with the token of {kept} instead of TOKEN")
        else:
            log(f"serving on {host} port {port}; open {url}/" + (f"?token={token}" if token else ""))
        print_json({"url": url, "models": [name for name, _ in model.listed()] if model else []})

    server = Server(build_app(settings, model), settings.access, settings.limits.seconds, ready)
    server.run(sockets=[listener])
    if model is None:
        return 0
    return 0 if model.close() else 1


def main(argv: list[str] | None = None) -> int:
    """Parse, open, serve."""
    return run_main(lambda: run(read_settings(argv)))


if __name__ == "__main__":
    sys.exit(main())
