# shellcheck shell=bash
# Settings and functions of the other scripts in this folder, which source this file. Every setting is
# a variable with a default. docs/clusters.md explains them.

CLUSTERS="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
REPO="$(dirname -- "$(dirname -- "${CLUSTERS}")")"
# The recipes' python3 is this one too.
if [[ -z "${PYTHON:-}" && -x "${REPO}/.venv/bin/python3" ]]; then
   PYTHON="${REPO}/.venv/bin/python3"
   export PATH="${REPO}/.venv/bin:${PATH}"
fi
PYTHON="${PYTHON:-python3}"

# This node: by address, or by interface; otherwise Ray chooses the interface that leads outside.
NODE_ADDRESS="${NODE_ADDRESS:-}"
NODE_INTERFACE="${NODE_INTERFACE:-}"
# What this node offers; otherwise Ray counts. Without GPUs, one CPU is one slot.
NUM_GPUS="${NUM_GPUS:-}"
NUM_CPUS="${NUM_CPUS:-}"

# Ports of the head, then of every node. Open them, and the kernel's range of free ports, between nodes.
RAY_PORT="${RAY_PORT:-6379}"
DASHBOARD_PORT="${DASHBOARD_PORT:-8265}"
NODE_PORTS="${NODE_PORTS:-6380}" # the first of five neighbours
AGENT_PORT="${AGENT_PORT:-52365}"
WORKER_PORTS="${WORKER_PORTS:-11000-12999}"

# Ray's sockets and logs on each node. REMOVE_RAY_TMPDIR=1 removes the folder when the node ends.
RAY_TMPDIR="${RAY_TMPDIR:-/tmp/ray}"
REMOVE_RAY_TMPDIR="${REMOVE_RAY_TMPDIR:-}"
OBJECT_STORE_BYTES="${OBJECT_STORE_BYTES:-}"

NODES_TIMEOUT_S="${NODES_TIMEOUT_S:-300}" # nodes may start this much later than the head
STOP_PATIENCE_S="${STOP_PATIENCE_S:-60}"  # a run may take this long to stop its processes

# Whoever reaches Ray's ports runs code on every node, so Ray asks for a token.
RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export RAY_AUTH_MODE RAY_TMPDIR RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"

say() { printf '[%s] %s\n' "$(uname -n)" "$*" >&2; }
die() { say "error: $1"; shift; (($# == 0)) || printf '    %s\n' "$@" >&2; exit 2; }

have_token() {
   [[ "${RAY_AUTH_MODE}" != token || -n "${RAY_AUTH_TOKEN:-}" ]] ||
      [[ -s "${RAY_AUTH_TOKEN_PATH:-${HOME}/.ray/auth_token}" ]]
}

# The address that other nodes use for this one.
own_address() {
   if [[ -n "${NODE_ADDRESS}" ]]; then
      printf '%s\n' "${NODE_ADDRESS}"
   elif [[ -n "${NODE_INTERFACE}" ]]; then
      PYTHONPATH="${REPO}" "${PYTHON}" "${CLUSTERS}/own_address.py" "${NODE_INTERFACE}"
   else
      "${PYTHON}" "${CLUSTERS}/own_address.py"
   fi
}

# HOST:PORT, with brackets around an IPv6 address.
at() { if [[ "$1" == *:* ]]; then printf '[%s]:%s\n' "$1" "$2"; else printf '%s:%s\n' "$1" "$2"; fi; }

# ray_node FLAGS...: a node of the cluster, until it ends or this script is told to end.
ray_node() {
   local flags=(
      --node-manager-port "$((NODE_PORTS))"
      --object-manager-port "$((NODE_PORTS + 1))"
      --runtime-env-agent-port "$((NODE_PORTS + 2))"
      --dashboard-agent-grpc-port "$((NODE_PORTS + 3))"
      --metrics-export-port "$((NODE_PORTS + 4))"
      --dashboard-agent-listen-port "${AGENT_PORT}"
      --min-worker-port "${WORKER_PORTS%-*}"
      --max-worker-port "${WORKER_PORTS#*-}"
      --disable-usage-stats
      --log-style record
      --log-color false
      --block
   )
   if [[ -n "${NUM_GPUS}" ]]; then flags+=(--num-gpus "${NUM_GPUS}"); fi
   if [[ -n "${NUM_CPUS}" ]]; then flags+=(--num-cpus "${NUM_CPUS}"); fi
   if [[ -n "${OBJECT_STORE_BYTES}" ]]; then flags+=(--object-store-memory "${OBJECT_STORE_BYTES}"); fi
   # Ray leaves the GPUs of processes that ask for none alone, and ends without waiting for its head.
   export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}"
   export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}"
   mkdir -p -- "${RAY_TMPDIR}"
   local log="${RAY_TMPDIR}/start-$$.log" code=0 told=""
   # Slurm gives USR1 to all processes of a task; it is for this script only.
   (trap '' USR1; exec "${PYTHON}" -m ray.scripts.scripts start "$@" "${flags[@]}" >"${log}" 2>&1) &
   local ray=$!
   trap 'told=yes; kill "${ray}" 2>/dev/null || true' INT TERM HUP USR1
   say "Ray starts here; its output is in ${log}"
   wait "${ray}" || code=$?
   while kill -0 "${ray}" 2>/dev/null; do wait "${ray}" || code=$?; done
   if [[ -z "${told}" ]]; then
      say "error: Ray ended here with exit code ${code}. Its last words:"
      tail --lines 30 -- "${log}" >&2
      ((code)) || code=1
   else
      say "Ray has ended here"
      code=0
   fi
   if [[ -n "${REMOVE_RAY_TMPDIR}" ]]; then rm -rf -- "${RAY_TMPDIR}"; fi
   return "${code}"
}

# drive NUM_NODES COMMAND...: waits for the nodes, then runs the command as the driver. When it ends,
# or this script is told to end, it ends the command and the processes in the array `nodes`.
nodes=()
driver=""
end_signal=TERM # tells a node to end
drive() {
   local num_nodes="$1" code=0
   shift
   trap 'end_all' EXIT
   trap 'exit 130' INT
   trap 'exit 143' TERM HUP
   "${PYTHON}" "${CLUSTERS}/wait_for_nodes.py" "${num_nodes}" --timeout-s "${NODES_TIMEOUT_S}" &
   driver=$!
   while kill -0 "${driver}" 2>/dev/null; do
      for node in "${nodes[@]}"; do
         kill -0 "${node}" 2>/dev/null || die "a node ended before all of them had started; see above."
      done
      sleep 0.2
   done
   wait "${driver}" || code=$?
   driver=""
   if ((code)); then exit "${code}"; fi
   say "running: $*"
   "$@" &
   driver=$!
   wait "${driver}" || code=$?
   driver=""
   exit "${code}"
}

end_all() {
   local code=$?
   trap '' INT TERM HUP
   if [[ -n "${driver}" ]]; then
      kill "${driver}" 2>/dev/null || true
      await_end "${driver}"
   fi
   for node in "${nodes[@]}"; do kill -s "${end_signal}" "${node}" 2>/dev/null || true; done
   for node in "${nodes[@]}"; do await_end "${node}"; done
   exit "${code}"
}

# Waits for the end of a child of this script. After STOP_PATIENCE_S the child gets SIGKILL.
await_end() {
   for ((tenth = 0; tenth < 10 * STOP_PATIENCE_S; tenth++)); do
      kill -0 "$1" 2>/dev/null || break
      sleep 0.1
   done
   kill -KILL "$1" 2>/dev/null || true
   wait "$1" 2>/dev/null || true
}
