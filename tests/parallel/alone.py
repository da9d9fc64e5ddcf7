"""Switch on loopback in a network namespace that has nothing else, then become the given command."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

_SET_FLAGS, _UP = 0x8914, 0x1 | 0x40  # linux/sockios.h, net/if.h: up and running

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))
os.execv(sys.argv[1], sys.argv[1:])
