"""A cable between two network namespaces that delays and drops frames: bad_link.py PID DEVICE PID DEVICE DELAY LOSS.

The kernel's own netem is not in every kernel; TAP devices are. Makes a device in the namespace of each process, says
`ready`, hands frames over until stdin ends, and prints how many there were and how many it dropped.
"""

import ctypes
import fcntl
import heapq
import os
import random
import selectors
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
FRAME = 65536


def tap(pid: str, name: str) -> int:
    """The file descriptor of a new TAP device in the network namespace of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"the namespace of {pid}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def main() -> None:
    """Hand frames over."""
    one, other = tap(*sys.argv[1:3]), tap(*sys.argv[3:5])
    delay, loss = float(sys.argv[5]), float(sys.argv[6])
    chance, frames, dropped = random.Random(7), 0, 0
    waiting: list[tuple[float, int, int, bytes]] = []
    poll = selectors.DefaultSelector()
    for descriptor in (one, other, sys.stdin.fileno()):
        poll.register(descriptor, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in poll.select(pause):
            if key.fd == sys.stdin.fileno():
                print(frames, dropped)
                return
            try:
                frame = os.read(key.fd, FRAME)
            except OSError:  # the device is not up yet
                continue
            frames += 1
            if chance.random() < loss:
                dropped += 1
                continue
            heapq.heappush(waiting, (time.monotonic() + delay, frames, other if key.fd == one else one, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            try:
                os.write(target, frame)
            except OSError:  # not up, or full: a frame more that is lost
                dropped += 1


if __name__ == "__main__":
    main()
