#!/usr/bin/env bash
# Two hosts on one machine, as network namespaces with a cable between them: runs torchrun_nodes.sh on both, with its
# arguments. Needs root, Linux and iproute2. Run with torch 2.13.0 and gloo (tests/test_examples.py).
#
#   examples/two_hosts.sh first --recipe small --data.path data/books --runtime.device cpu --schedule.max-steps 20
set -euo pipefail
here=$(dirname "$0")
hosts=("golf$$a" "golf$$b")
cleanup() {
  kill "${jobs[@]}" 2>/dev/null || true
  wait "${jobs[@]}" || true # each saves its run first
  for host in "${hosts[@]}"; do ip netns del "$host" 2>/dev/null || true; done
}
jobs=()
trap cleanup EXIT
trap 'exit 143' TERM INT
for host in "${hosts[@]}"; do ip netns add "$host"; done
ip link add "${hosts[0]}" netns "${hosts[0]}" type veth peer name "${hosts[1]}" netns "${hosts[1]}"
for i in 0 1; do
  ip -n "${hosts[i]}" addr add "10.77.0.$((i + 1))/24" dev "${hosts[i]}"
  for device in lo "${hosts[i]}"; do ip -n "${hosts[i]}" link set "$device" up; done
done
for i in 0 1; do
  HEAD=10.77.0.1 NODES=2 NODE=$i PROCS=1 ADDRESS=10.77.0.$((i + 1)) GLOO_SOCKET_IFNAME=${hosts[i]} \
    ip netns exec "${hosts[i]}" unshare --uts sh -c 'hostname "$1"; shift; exec "$@"' - "${hosts[i]}" \
    "$here/torchrun_nodes.sh" "$@" &
  jobs+=($!)
done
code=0
for job in "${jobs[@]}"; do wait "$job" || code=$?; done
exit "$code"
