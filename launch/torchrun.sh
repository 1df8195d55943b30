#!/bin/sh
# Train on this machine, or as one node of several: every node runs the same line.
#
#   launch/torchrun.sh experiment=demo data.sources.mine=stores/mine
#   RANKS=8 NODES=2 NODE=0 HEAD=10.0.0.1:29500 launch/torchrun.sh model=llama3_8b ...
#
# RANKS per node (default: GPUs, else 1), NODES, NODE (0 first), HEAD (address:port of node 0).
set -eu
python="${PYTHON:-python}"
ranks="${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${NODES:-1}" -gt 1 ]; then
    set -- --nnodes "$NODES" --node-rank "$NODE" --master-addr "${HEAD%:*}" \
        --master-port "${HEAD##*:}" --nproc-per-node "$ranks" -m llmtrain train "$@"
else
    set -- --standalone --nproc-per-node "$ranks" -m llmtrain train "$@"
fi
exec "$python" -m torch.distributed.run "$@"
