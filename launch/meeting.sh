# Where the ranks meet: the first node's address as Slurm knows it, a port by the job's number.
address() { scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1; }
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(address "$(echo "$nodes" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 20000))
export head port python hash
export meeting="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
export -f address

# 1. Look at every node before its GPUs wait for the others. A node that is not ready names itself.
look='ranks=$1
shift
exec "$python" -m llmtrain.launch.preflight node="$SLURMD_NODENAME" config="$hash" \
    gpus={{gpus}} port="$port" head="$head" -- "$@"'
{{preflight}}

# 2. Train, from where the run stands. A supervisor on every node asks the ranks themselves to save and stop: torchrun would
# kill them after 30 s. $1 is the number of ranks of a node.
train='ranks=$1
shift
exec "$python" -m llmtrain.launch.supervise -- "$python" -m torch.distributed.run \
    --nnodes={{num_nodes}} --nproc-per-node="$ranks" --signals-to-handle=SIGINT \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head:$port" --rdzv-id="$meeting" --rdzv-conf=is_host=$((SLURM_PROCID == 0)) \
    --local-addr="$(address "$SLURMD_NODENAME")" -m llmtrain train "$@"'
