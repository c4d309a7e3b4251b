#!/usr/bin/env bash
# Another node of the Ray cluster of head.sh. It runs until Ctrl-C, which ends this node and nothing else.
#
#   bash scripts/clusters/node.sh 10.0.0.1:6379
#   NODE_INTERFACE=ib0 bash scripts/clusters/node.sh 10.0.0.1:6379
#
# common.sh lists the other variables.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

(($# == 1)) || die "the head's address is missing." "For example: bash scripts/clusters/node.sh 10.0.0.1:6379"
have_token || die "this node has no token of the cluster." \
   "Copy ~/.ray/auth_token from the head to the same place here, with mode 600."

flags=(--address "$1")
# Without this, Ray takes the address of the interface that leads to the head.
if [[ -n "${NODE_ADDRESS}${NODE_INTERFACE}" ]]; then
   address="$(own_address)"
   flags+=(--node-ip-address "${address}")
fi
ray_node "${flags[@]}"
