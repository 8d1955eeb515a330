#!/usr/bin/env bash
# Runs a script in several processes, by Slurm: ./tools/run_dist_slurm.sh PARTITION JOB_NAME PROCESSES SCRIPT [FLAG ...]
#
#   GPUS_PER_NODE=8 ./tools/run_dist_slurm.sh gpu detreg 16 ./configs/DETReg_top30_in.sh --batch_size 24
#
# PROCESSES is their number on all nodes, one for each GPU. It waits for the nodes and then shows what is printed; a job
# that goes back into the queue when its time is up is run_with_submitit.py's. Environment:
#   GPUS_PER_NODE  the most processes on a node (8)
#   NNODES         nodes (as few as GPUS_PER_NODE allows)
#   CPUS_PER_TASK  CPUs of each process (5)
#   SRUN_ARGS      other options of srun, which win: "--time=8:00:00 --account=vision"; "--gres=none" where there are
#                  no GPUs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/run_dist_checks.sh"

(($# >= 4)) || fail "usage: [GPUS_PER_NODE=8] $0 PARTITION JOB_NAME PROCESSES SCRIPT [FLAG ...]"
partition=$1
job_name=$2
place_processes "$3"
shift 3
require_program "$1"
require_count CPUS_PER_TASK "${CPUS_PER_TASK:-5}"
command -v srun > /dev/null || fail "there is no srun here: start it on a machine of a Slurm cluster"

# SRUN_ARGS holds several words.
# shellcheck disable=SC2086
exec srun --partition="$partition" --job-name="$job_name" --nodes="$nodes" --ntasks="$((nodes * per_node))" \
    --ntasks-per-node="$per_node" --gres="gpu:$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} "$@"
