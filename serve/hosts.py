"""One server over several processes: process 0 plans the steps and tells the others, who run the same programs.

    process 0   HTTP -> engine -> Leader -> Device
                                    |
    the others                    follow -> Device

Every device has the whole outcome of a step, so process 0 reads it as if it were alone.
"""

import os
import secrets
import signal
import socket
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Literal

import jax
import numpy as np

from idlm_jax import cluster
from serve.config import EngineConfig
from serve.device import Draws
from serve.runs import ReadLater, Runs

Call = Literal["decode", "prefill", "reset"]


class Leader:
    """The device of process 0, whose every call the other processes make too, in the same order."""

    def __init__(self, device: Runs, followers: Sequence[Connection]):
        """Args: what runs the steps here, and the others (`meet_followers`)."""
        self._device, self._followers = device, followers

    def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater:
        """As `Device.decode`.

        Raises:
            OSError: another process has ended.
        """
        self._tell("decode", words, draws, masks, choice)
        return self._device.decode(words, draws, masks, choice)

    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> ReadLater:
        """As `Device.prefill`; raises as `decode`."""
        self._tell("prefill", words, masks, choice)
        return self._device.prefill(words, masks, choice)

    def reset(self) -> None:
        """As `Device.reset`; raises as `decode`."""
        self._tell("reset")
        self._device.reset()

    def _tell(self, call: Call, *arguments: Any) -> None:
        for follower in self._followers:
            follower.send((call, arguments))


def follow(device: Runs, leader: Connection) -> None:
    """Makes the calls that process 0 makes, until it ends.

    A step that fails here ends this process, and with it the server: the others would wait for its part for ever.
    """
    # Whoever ends a server ends its processes together, but requests still run that process 0 has promised to finish.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before: ReadLater | None = None
    while True:
        try:
            call, arguments = leader.recv()
        except (EOFError, ConnectionError):
            return
        outcome = getattr(device, call)(*arguments)
        if before is not None:
            np.asarray(before)  # raises what went wrong, one step late as in process 0
        before = outcome


def meet_followers(config: EngineConfig) -> list[Connection]:
    """Process 0: waits until all others have come with the key that only processes of this run can read.

    Args: what `meet_leader` compares.
    """
    cluster.from_first("config", lambda: repr(config))
    key = secrets.token_bytes(32)
    followers: list[Connection] = []
    with Listener(("0.0.0.0", 0), backlog=jax.process_count(), authkey=key) as listener:
        port = listener.address[1]
        cluster.from_first("leader", lambda: f"{port} {key.hex()}")
        while len(followers) < jax.process_count() - 1:
            try:
                followers.append(_at_once(listener.accept()))
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # somebody else
    return followers


def meet_leader(config: EngineConfig) -> Connection:
    """Every other process: finds process 0.

    Raises:
        ValueError: its configuration is another.
    """
    if (theirs := cluster.from_first("config", lambda: "")) != repr(config):
        raise ValueError(f"process 0 was started with other flags: it serves {theirs}, this one {config}")
    port, key = cluster.from_first("leader", lambda: "").split()
    return _at_once(Client((cluster.first_host().strip("[]"), int(port)), authkey=bytes.fromhex(key)))


def _at_once(connection: Connection) -> Connection:
    # A step's words are two small writes; the second would wait 40 ms for the first to be acknowledged.
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
