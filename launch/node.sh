# One node of a run in a container or on a rented machine: look at it, then start its ranks. The
# nodes come up minutes apart (images are pulled, machines start): each waits ten for the first.
set -u
node={{node}}
head={{head}}
{{python}} -m llmtrain.launch.preflight node="$(hostname)" config={{hash}} gpus={{gpus}} \
    $([ "$node" = 0 ] && echo port={{port}}) -- {{words}} || exit $?
exec {{python}} -m llmtrain.launch.supervise run={{run}} -- \
    {{python}} -m torch.distributed.run --nnodes={{num_nodes}} --nproc-per-node={{ranks}} \
    --rdzv-backend=c10d --rdzv-endpoint="$head:{{port}}" --rdzv-id={{name}} \
    --rdzv-conf=is_host=$((node == 0)),read_timeout=600 --local-addr="{{address}}" \
    -m llmtrain train {{words}}
