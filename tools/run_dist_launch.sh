#!/usr/bin/env bash
# Runs a script in several processes, by torchrun: ./tools/run_dist_launch.sh PROCESSES SCRIPT [FLAG ...]
#
#   GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./configs/DETReg_top30_in.sh --batch_size 24 --num_workers 8
#   NODE_RANK=0 MASTER_ADDR=gpu1 ./tools/run_dist_launch.sh 16 ./configs/DETReg_top30_in.sh     # on gpu1
#   NODE_RANK=1 MASTER_ADDR=gpu1 ./tools/run_dist_launch.sh 16 ./configs/DETReg_top30_in.sh     # on gpu2
#
# PROCESSES is their number on all nodes, one for each GPU; a node without GPUs runs them on its CPUs. Environment:
#   GPUS_PER_NODE  the most processes on a node (8)
#   NNODES         nodes (as few as GPUS_PER_NODE allows)
#   NODE_RANK      which of them this is, from 0 on
#   MASTER_ADDR    name or address of node 0
#   MASTER_PORT    a free port there (29500; on one node any that is free)
#   PYTHON         the interpreter (python)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/run_dist_checks.sh"

(($# >= 2)) || fail "usage: [GPUS_PER_NODE=8] $0 PROCESSES SCRIPT [FLAG ...]"
place_processes "$1"
shift
require_program "$1"

if ((nodes > 1)); then
    [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] && ((NODE_RANK < nodes)) ||
        fail "$nodes nodes: set NODE_RANK on each of them, to 0 on the first and up to $((nodes - 1))"
    [[ -n ${MASTER_ADDR:-} ]] || fail "$nodes nodes: set MASTER_ADDR on each of them to the address of the first"
fi
if ((nodes > 1)) || [[ -n ${MASTER_PORT:-} ]]; then
    place=(--nnodes="$nodes" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}"
           --master_port="${MASTER_PORT:-29500}")
else
    place=(--standalone)
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${place[@]}" --nproc_per_node="$per_node" --no-python "$@"
