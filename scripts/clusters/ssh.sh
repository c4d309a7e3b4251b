#!/usr/bin/env bash
# A run on nodes that ssh reaches without a password: starts Ray on them, runs a command as its driver,
# ends both. Run it on the first node; HOSTS names the others.
#
#   HOSTS="node2" bash scripts/clusters/ssh.sh                      scripts/run-qwen3-4B.sh on 2 nodes
#   HOSTS="$(echo node{02..32})" bash scripts/clusters/ssh.sh       the same on 32
#   HOSTS="node2 node3" bash scripts/clusters/ssh.sh bash my-run.sh --num-rollout 100
#
# The repository and the Python environment must be at the same path on every node. Ctrl-C ends the run
# and the nodes that this script started, and nothing else. The command gets NUM_NODES and RAY_ADDRESS.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read -r -a hosts <<<"${HOSTS:?name the other nodes, for example HOSTS=\"node2 node3\"}"
SSH="${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=30}"
export NUM_NODES=$((1 + ${#hosts[@]}))
if (($# == 0)); then set -- bash "${REPO}/scripts/run-qwen3-4B.sh"; fi
if [[ "${RAY_AUTH_MODE}" == token && -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]]; then
   RAY_AUTH_TOKEN="$("${PYTHON}" -c 'import secrets; print(secrets.token_hex(32))')"
   export RAY_AUTH_TOKEN
fi

address="$(own_address)"
RAY_ADDRESS="$(at "${address}" "${RAY_PORT}")"
NODE_ADDRESS="${address}" bash "${CLUSTERS}/head.sh" &
nodes=($!)

# A node's settings travel on standard input, so the token is on no command line. The node ends when its
# input does: after this script, or when the connection is lost.
remote() {
   local name
   for name in PYTHON NODE_INTERFACE NUM_GPUS NUM_CPUS NODE_PORTS AGENT_PORT WORKER_PORTS RAY_TMPDIR \
      REMOVE_RAY_TMPDIR OBJECT_STORE_BYTES RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH; do
      if [[ -n "${!name:-}" ]]; then printf 'export %s=%q\n' "${name}" "${!name}"; fi
   done
   printf 'command=(bash %q %q)\n' "${CLUSTERS}/node.sh" "${RAY_ADDRESS}"
   cat <<'SCRIPT'
main() {
   exec 3<&0
   "${command[@]}" </dev/null 3<&- &
   local node=$! code=0
   cat <&3 >/dev/null &
   local input=$!
   trap : INT TERM HUP
   wait -n "${node}" "${input}" || code=$?
   kill "${node}" "${input}" 2>/dev/null
   wait "${node}"
   exit "${code}"
}
main
SCRIPT
   exec tail --follow --pid=$$ /dev/null
}

for host in "${hosts[@]}"; do
   # shellcheck disable=SC2086 # SSH holds a command and its options
   remote | ${SSH} "${host}" bash -s &
   nodes+=($!)
done
export RAY_ADDRESS
drive "${NUM_NODES}" "$@"
