#!/bin/sh
# Train under DeepSpeed's launcher on this machine, or on several over ssh: run it on the first.
#
#   launch/deepspeed.sh engine=deepspeed experiment=demo data.sources.mine=stores/mine
#   HOSTS=hostfile launch/deepspeed.sh engine=deepspeed engine.deepspeed.zero_stage=3 model=llama3_8b ...
#
# RANKS per node (default: GPUs, else 1), HOSTS (a file of lines `address slots=8`), PORT.
set -eu
python="${PYTHON:-python}"
ranks="${RANKS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Without a GPU it would count the machine's sockets as its accelerators.
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || export DS_ACCELERATOR=cpu
if [ -n "${HOSTS:-}" ]; then
    set -- --hostfile "$HOSTS" --module llmtrain train "$@"
else
    set -- --num_gpus "$ranks" --module llmtrain train "$@"
fi
exec "$python" -m deepspeed.launcher.runner --master_port "${PORT:-29500}" "$@"
