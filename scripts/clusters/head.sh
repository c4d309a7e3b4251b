#!/usr/bin/env bash
# The first node of a Ray cluster. It runs until Ctrl-C, which ends this node and nothing else.
#
#   bash scripts/clusters/head.sh
#   NODE_ADDRESS=10.0.0.1 bash scripts/clusters/head.sh       other nodes reach it at this address
#   NODE_INTERFACE=ib0 bash scripts/clusters/head.sh          or at this interface's address
#   RAY_PORT=6400 WORKER_PORTS=20000-21999 bash scripts/clusters/head.sh
#
# common.sh lists the other variables.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

address="$(own_address)"
if ! have_token; then
   [[ -z "${RAY_AUTH_TOKEN_PATH:-}" ]] || die "RAY_AUTH_TOKEN_PATH ${RAY_AUTH_TOKEN_PATH}: no such file, or empty."
   (umask 077 && "${PYTHON}" -m ray.scripts.scripts get-auth-token --generate >/dev/null)
   say "made ${HOME}/.ray/auth_token. Every node needs this file: copy it, unless the home is shared."
fi
say "on the other nodes:  bash scripts/clusters/node.sh $(at "${address}" "${RAY_PORT}")"
say "for the run:         export RAY_AUTH_MODE=${RAY_AUTH_MODE} RAY_ADDRESS=$(at "${address}" "${RAY_PORT}")"
say "for ray job submit:  RAY_ADDRESS=http://$(at "${address}" "${DASHBOARD_PORT}")"

ray_node --head --port "${RAY_PORT}" --node-ip-address "${address}" --temp-dir "${RAY_TMPDIR}" \
   --dashboard-host "${DASHBOARD_HOST:-${address}}" --dashboard-port "${DASHBOARD_PORT}"
