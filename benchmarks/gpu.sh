#!/usr/bin/env bash
# Everything that is measured on a GPU, in one run: training steps of LLaMA 1B, 3B and 8B-wide
# blocks, every attention backend, the fused kernels, and the same models in transformers and litgpt
# under torch.compile. Writes benchmarks/results/gpu_*.json and benchmarks/results/gpu.md.
#
#     benchmarks/gpu.sh                          # on a machine with a GPU
#     benchmarks/gpu.sh budget_s=560 out="$OUT"  # as much as fits; what is there already is kept
#     benchmarks/gpu.sh only=kernels,peers
#     benchmarks/gpu.sh tiny=true out=/tmp/gpu   # the same commands on a CPU at tiny sizes
#     benchmarks/gpu.sh wheels                   # with a network: fills .whl/ for one without
#
# Packages that the machine lacks are installed from the wheels in .whl/, if there are any, into a
# folder of their own; nothing is downloaded but by "wheels". PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ "${1:-}" = wheels ]; then
    target=(--python-version "${TARGET_PYTHON:-3.12}" --implementation cp --only-binary=:all:)
    for platform in 28 27 17; do target+=(--platform "manylinux_2_${platform}_x86_64"); done
    target+=(--platform manylinux2014_x86_64 --platform any)
    "$python" -m pip download -q --no-deps -d .whl "${target[@]}" \
        hydra-core==1.3.8 omegaconf==2.3.1 blake3==1.0.11 \
        torchao==0.18.0 litgpt==0.5.9 jsonargparse==4.43.0 typeshed-client==2.8.2
    "$python" -m pip wheel -q --no-deps -w .whl antlr4-python3-runtime==4.9.3  # has no wheel
    ls -l .whl
    exit
fi

if compgen -G ".whl/*.whl" > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" .whl/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
"$python" benchmarks/gpu.py "$@"
