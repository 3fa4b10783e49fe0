"""Numbers of the running server in Prometheus' text format (version 0.0.4)."""

import threading
from bisect import bisect_left
from collections.abc import Callable

import psutil

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, times and what is asked for when somebody looks. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._about: dict[str, tuple[str, str]] = {}
        self._counters: dict[str, dict[Labels, float]] = {}
        self._times: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        process = psutil.Process()
        self.gauge(
            "process_resident_memory_bytes", "Memory of the server's process.", lambda: process.memory_info().rss
        )

    def counter(self, name: str, about: str) -> None:
        """Announce a number that only grows."""
        self._about[name] = ("counter", about)
        self._counters[name] = {}

    def times(self, name: str, about: str) -> None:
        """Announce a histogram of seconds."""
        self._about[name] = ("histogram", about)
        self._times[name], self._sums[name] = [0] * (len(SECONDS) + 1), 0.0

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Announce a number that is asked for."""
        self._about[name] = ("gauge", about)
        self._gauges[name] = value

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Let a counter grow."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            counters = self._counters[name]
            counters[key] = counters.get(key, 0) + value

    def took(self, name: str, seconds: float) -> None:
        """Count a time."""
        with self._lock:
            self._times[name][bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds

    def text(self) -> str:
        """All numbers."""
        lines = []
        gauges = {name: value() for name, value in self._gauges.items()}
        with self._lock:
            for name, (kind, about) in self._about.items():
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
                if kind == "histogram":
                    lines += self._histogram(name)
                elif kind == "gauge":
                    lines.append(f"{name} {gauges[name]:g}")
                else:
                    found = self._counters[name] or {(): 0.0}
                    lines += [f"{name}{written(key)} {value:.17g}" for key, value in found.items()]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._times[name], strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sums[name]:.6f}", f"{name}_count {total}"]


def written(labels: Labels) -> str:
    """Labels as they are written; their values are names of ours, without quotes or line breaks."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
