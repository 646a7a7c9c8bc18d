#!/usr/bin/env bash
# RunPod: in a pod with a network volume at /workspace that holds this checkout, `bash examples/runpod.sh`. Not run.
# As the pod's start command it also resumes a run on a pod that was interrupted, because everything lies in the volume.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -d .venv ]; then
  python3 -m venv .venv
  .venv/bin/pip install -c constraints.txt torch
  .venv/bin/pip install -c constraints.txt -e ".[train]"
fi
. .venv/bin/activate
golfgpt data download --variant sp1024 --train-shards 80 # goes on, or checks what is there
PROCS=$(nvidia-smi --list-gpus | wc -l)
export PROCS
examples/torchrun_nodes.sh first --recipe baseline --data.path data/fineweb10B_sp1024
