#!/usr/bin/env bash
# Train on one or more nodes: start this on each, with the same arguments. Starting it again resumes the run.
# Run with torch 2.13.0 and gloo on two network namespaces (examples/two_hosts.sh); not run with GPUs or NCCL.
#
#   HEAD=10.0.0.1 NODES=2 NODE=0 examples/torchrun_nodes.sh first --recipe baseline --data.path data/fineweb10B_sp1024
#
# HEAD         name or address of node 0, which all nodes can reach (localhost)
# NODES, NODE  how many nodes there are, and which of them this is (1, 0)
# PROCS        processes on this node, one for each GPU (8)
# PORT         of the rendezvous on HEAD (29500)
# ADDRESS      of this node, where the others cannot resolve its host name
# GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  network interface, where the default is not the right one
#
# The folder runs/ must be shared by all nodes, since each reads the config of a run that it resumes. Of the data, every
# node may have a copy. torchrun restarts nothing: a process that fails ends the run on all nodes.
set -euo pipefail
name=$1
shift
run=(--name "$name" "$@")
# No node trains before all have come this far, so all see the same.
if [ -e "runs/$name/config.json" ]; then run=(--resume "runs/$name"); fi
exec torchrun \
  --nnodes "${NODES:-1}" --nproc-per-node "${PROCS:-8}" ${ADDRESS:+--local-addr "$ADDRESS"} \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "$name" \
  --rdzv-conf "is_host=$([ "${NODE:-0}" = 0 ] && echo true || echo false)" \
  -m golfgpt train "${run[@]}"
