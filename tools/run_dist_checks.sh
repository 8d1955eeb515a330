# What tools/run_dist_launch.sh and tools/run_dist_slurm.sh have in common; they source it.

fail() {
    echo "error: $1" >&2
    exit 2
}

# require_count NAME VALUE: the value is a whole number from 1 on.
require_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2 is not a whole number from 1 on"
}

# require_program SCRIPT: it can be run as it is given.
require_program() {
    if ! command -v -- "$1" > /dev/null; then
        [[ -e $1 ]] && fail "$1 can't be run: it must be executable (chmod +x) and be given with its folder (./$1)"
        fail "$1: no such script"
    fi
}

# place_processes PROCESSES: sets nodes and per_node, as far as they are set by GPUS_PER_NODE (8) and NNODES.
place_processes() {
    require_count PROCESSES "$1"
    require_count GPUS_PER_NODE "${GPUS_PER_NODE:-8}"
    require_count NNODES "${NNODES:-1}"
    nodes=${NNODES:-$((($1 + ${GPUS_PER_NODE:-8} - 1) / ${GPUS_PER_NODE:-8}))}
    per_node=$(($1 / nodes))
    ((per_node * nodes == $1)) || fail "$1 processes can't be shared out evenly among $nodes nodes"
    ((per_node <= ${GPUS_PER_NODE:-per_node})) ||
        fail "$1 processes with NNODES $nodes are $per_node on each, more than GPUS_PER_NODE $GPUS_PER_NODE"
}
