"""Several training processes on this machine: to try a run over hosts without any, or one process per GPU.

  python -m train.launch_local --processes 2 -- configs/tiny_ar_cpu.yaml mesh.fsdp=-1
  python -m train.launch_local --processes 4 --devices-per-process 2 -- configs/x.yaml mesh.data=4 mesh.fsdp=2

What follows `--` is given to `python -m train` in every process. Each line of output is marked with its process.
SIGTERM or Ctrl-C stops and saves the run, a second one kills it. When one process fails, the others are ended, and its
exit code is this command's.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

_POLL_S = 0.2
_GRACE_S = 3.0  # for the others to say what is wrong, too, when one has failed


def main(arguments: list[str] | None = None) -> int:
    """Starts the processes, waits for them, and returns the exit code of the first that failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m train.launch_local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--devices-per-process", type=int, default=1, metavar="D", help="GPUs, or fake CPU devices, of each; default 1"
    )
    parser.add_argument("train_arguments", nargs="+", metavar="-- CONFIG key=value", help="as for python -m train")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.devices_per_process < 1:
        parser.error("--processes and --devices-per-process must be at least 1")
    coordinator = f"127.0.0.1:{_free_port()}"
    running = [
        _start(number, coordinator, options.processes, options.devices_per_process, options.train_arguments)
        for number in range(options.processes)
    ]
    _forward_signals(running)
    printers = [
        threading.Thread(target=_print_marked, args=(number, process.stdout)) for number, process in enumerate(running)
    ]
    for printer in printers:
        printer.start()
    code = _wait(running)
    for printer in printers:
        printer.join()
    return code


def _start(
    number: int, coordinator: str, num_processes: int, num_devices: int, arguments: list[str]
) -> subprocess.Popen[bytes]:
    first = number * num_devices
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + num_devices))),  # GPUs of this process
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "train", *arguments, "--coordinator", coordinator]
    command += ["--num-processes", str(num_processes), "--process-id", str(number)]
    # A session of its own: Ctrl-C in the terminal reaches the processes once, through this one.
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forward_signals(running: list[subprocess.Popen[bytes]]) -> None:
    """The first SIGTERM or SIGINT stops the run, which then saves; a second one kills it."""
    seen: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)
        for process in running:
            process.send_signal(signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)


def _print_marked(number: int, output: IO[bytes]) -> None:
    for line in output:
        print(f"[{number}] {line.decode(errors='replace')}", end="", flush=True)


def _wait(running: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all; ends the others once one has failed."""
    while True:
        codes = [process.poll() for process in running]
        failed = [(number, code) for number, code in enumerate(codes) if code]
        if failed:
            return _end_others(running, *failed[0])
        if None not in codes:
            return 0
        time.sleep(_POLL_S)


def _end_others(running: list[subprocess.Popen[bytes]], number: int, code: int) -> int:
    if code != 128 + signal.SIGTERM:  # that one was stopped and has saved; so do the others, after the same step
        print(f"process {number} ended with exit code {code}: ending the others", flush=True)
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(_POLL_S)
        for process in running:
            process.kill()
    for process in running:
        process.wait()
    return code if code > 0 else 128 - code  # killed by a signal counts as a shell would count it


if __name__ == "__main__":
    sys.exit(main())
