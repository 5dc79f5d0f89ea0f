"""The first process inside the sandbox: shuts the doors behind itself, then becomes the command.

Started by `sandbox.py` under `unshare`, on the interpreter's standard library alone: `SETTINGS_JSON COMMAND...`.
"""

import ctypes
import fcntl
import json
import os
import resource
import socket
import struct
import sys

# linux/if.h, linux/sockios.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
# linux/mount.h, fcntl.h; the number of mount_setattr(2) is the same on every architecture.
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x20, 0x1000, 0x4000, 0x40000, 0x2, 0x4
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1

LIMITS = {
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "cpu_s": resource.RLIMIT_CPU,
    "num_processes": resource.RLIMIT_NPROC,
    "num_files": resource.RLIMIT_NOFILE,
}


def main() -> None:
    """Reads the settings, applies them and becomes the command."""
    settings, command = json.loads(sys.argv[1]), sys.argv[2:]
    if settings["is_isolated"]:
        with socket.socket(fileno=settings["channel"]) as channel:
            send_listener(channel, settings["port"])
        make_read_only(settings["writable"], settings["temporary"])
    for name, limit in settings["limits"].items():
        resource.setrlimit(LIMITS[name], (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execvp(command[0], command)


def send_listener(channel: socket.socket, port: int) -> None:
    """Listens on this namespace's own loopback, and hands the socket to the relay outside, which accepts on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0)))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
    with socket.create_server(("127.0.0.1", port)) as listener:
        socket.send_fds(channel, [b"listener"], [listener.fileno()])


def make_read_only(writable: str, temporary: str) -> None:
    """Makes every file system read-only but `writable`, and one in memory at `temporary`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(what: str, status: int) -> None:
        if status != 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
        check(f"mount {target}", libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))

    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount(writable, writable, None, MS_BIND)
    read_only = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr: set, clear, propagation, user
    arguments = (AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.c_size_t(len(read_only)))
    check("mount_setattr /", libc.syscall(SYS_MOUNT_SETATTR, *arguments))
    mount(None, writable, None, MS_REMOUNT | MS_BIND)
    mount("tmpfs", temporary, "tmpfs", MS_NOSUID | MS_NODEV, "size=1g")
    os.chdir(writable)  # the working directory was entered under the mount that is read-only now


if __name__ == "__main__":
    main()
