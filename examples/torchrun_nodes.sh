#!/usr/bin/env bash
# Train on several nodes: start this on each of them, with the same arguments. Starting it again resumes the run.
# Run with torch 2.13.0 and gloo on two network namespaces (examples/two_hosts.sh); not run with GPUs or NCCL.
#
#   HEAD=10.0.0.1 NODES=2 NODE=0 examples/torchrun_nodes.sh first --recipe baseline --data.path data/fineweb10B_sp1024
#
# HEAD     address or name of node 0, which the others can reach      NODES, NODE  number of nodes, and which this is
# PROCS    processes on this node, one for each GPU (8)               PORT         of the rendezvous (29500)
# ADDRESS  of this node, if the others cannot resolve its host name   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME  interface
#
# The data may be a copy on each node. The folder runs/ must be shared, because every node reads the config of a run that
# it resumes. torchrun does not restart anything itself: a node that fails ends the run on all.
set -euo pipefail
name=$1
shift
run=(--name "$name" "$@")
# No node trains before all have come this far, so all see the same.
if [ -e "runs/$name/config.json" ]; then run=(--resume "runs/$name"); fi
exec torchrun \
  --nnodes "$NODES" --nproc-per-node "${PROCS:-8}" ${ADDRESS:+--local-addr "$ADDRESS"} \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "$name" \
  --rdzv-conf "is_host=$([ "$NODE" = 0 ] && echo true || echo false)" \
  -m golfgpt train "${run[@]}"
