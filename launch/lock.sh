#!/usr/bin/env bash
# Resolve pyproject.toml anew into requirements.lock (running) and requirements-dev.lock (working on it).
# torch is pinned by hand: the lock names the version, each machine's index decides CPU or CUDA build.
set -euo pipefail
cd "$(dirname "$0")/.."
torch="torch==2.13.0"
python="${PYTHON:-python3}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip -qq --disable-pip-version-check "$@"; }
freeze() { pip freeze --all | grep -vE '^(pip|llmtrain)( |=|@)|^-e ' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | sort -f; }

pip install "$torch" setuptools
pip install ".[data,wandb]"
freeze > "$scratch/runtime"
# DeepSpeed's source asks the installed torch what to build.
DS_BUILD_OPS=0 pip install --no-build-isolation ".[data,wandb,tensorboard,dashboard,dev,deepspeed,eval,fp8,qlora,ray,slurm,sweep]"
freeze > "$scratch/dev"

{ echo "# What a run needs (launch/lock.sh writes this file)."; cat "$scratch/runtime"; } > requirements.lock
{
  echo "# What the tests and checks need beside requirements.lock (launch/lock.sh writes this file)."
  comm -13 <(sort "$scratch/runtime") <(sort "$scratch/dev") | sort -f
} > requirements-dev.lock
