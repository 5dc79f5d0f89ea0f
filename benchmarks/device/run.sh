#!/bin/sh
# Runs one part of the device kit on the accelerator of this machine:  benchmarks/device/run.sh kernels
# Needs a python with jax and nothing installed from this repository. PYTHON names another interpreter; WHEELS a folder
# of pure-Python wheels to import from where that python lacks a package (say, jaxtyping and wadler_lindig).
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
path=$root
for wheel in "${WHEELS:-/nonexistent}"/*.whl; do
    [ -e "$wheel" ] && path=$path:$(cd "$(dirname "$wheel")" && pwd)/${wheel##*/}
done
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.device "$@"
