#!/bin/bash
# One training run over several nodes of a SLURM cluster:
#
#   sbatch --nodes 4 train/launch_slurm.sh configs/x.yaml mesh.data=4 mesh.fsdp=8
#
# JAX reads the step's own variables: SLURM_NTASKS, SLURM_PROCID and the first node of the list, which is where process 0
# listens. It gives each task the one GPU with the task's number on its node, so there must be as many tasks as GPUs.
# The folder with the code, the environment, the data and output_dir must be one that all nodes see.
#
# Two minutes before the time is up, or when the job is preempted, SLURM sends SIGTERM; the run saves after a step that
# all processes agree on and ends with 143. The last lines then put the job back into the queue, where the same command
# resumes, on as many nodes as it gets.

#SBATCH --job-name=idlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8         # as many as GPUs in a node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120           # to the tasks of the step, not to this script
#SBATCH --requeue
#SBATCH --open-mode=append          # one log over all its sessions
#SBATCH --output=runs/slurm-%j.log

set -u
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
if [ $# -eq 0 ]; then
  echo "usage: sbatch train/launch_slurm.sh CONFIG [key=value ...]" >&2
  exit 2
fi

# A proxy would swallow the processes' own connections.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy

srun --kill-on-bad-exit=1 .venv/bin/python -m train "$@" --distributed
code=$?

if [ "$code" -eq 143 ]; then  # stopped and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
