#!/usr/bin/env bash
# From a raw crawl to a trained, resumed, talking model, on a laptop's CPU and without the network.
# `make demo` runs it; every command is printed before it runs and can be run by hand. A step that
# is done is not done again: run it a second time, or after any kind of stop, and it goes on.
# `rm -rf demo` starts anew. A smaller one, elsewhere:
#   DEMO_OUT=/tmp/demo DEMO_PAGES=600 DEMO_TOKENS=60e3 DEMO_STOP=30 bash launch/demo.sh
# DEMO_MORE="model.num_hidden_layers=2 ..." adds to the training command.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${DEMO_OUT:-demo}
PAGES=${DEMO_PAGES:+pages=$DEMO_PAGES}
TOKENS=${DEMO_TOKENS:-0.65e6}
STOP=${DEMO_STOP:-250}
RUN=$OUT/runs/demo
STORES=$OUT/corpus/stores
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# step NAME COMMAND: run the command once and keep how long it took.
step() {
  local name=$1 command start=$SECONDS
  command=$(tr -s ' ' <<< "$2")
  if [[ -f $OUT/.done/$name ]]; then
    echo "== $name: done before"
    return
  fi
  printf '\n== %s\n$ %s\n' "$name" "$command"
  eval "$command"
  echo $((SECONDS - start)) > "$OUT/.done/$name"
}

main() {
  # 1. A crawl: the documentation on this machine, as WARC files in three sources.
  step crawl "llmtrain-data sample out=$OUT/crawl $PAGES"

  # 2. WARC -> text -> C4 rules -> language -> deduplication -> held-out split -> tokenizer -> tokens.
  step pipeline "llmtrain-data run pipeline=demo num_workers=2 out=$OUT/corpus \
    input.stdlib=$OUT/crawl/stdlib input.packages=$OUT/crawl/packages \
    input.licenses=$OUT/crawl/licenses"

  # 3. Train on two processes, each with half of the layers; stop on the way; the same command goes on.
  train="torchrun --standalone --nproc-per-node 2 -m llmtrain train experiment=demo \
    name=demo runs_dir=$OUT/runs parallel.pp=2 training.num_tokens=$TOKENS tokenizer.path=$OUT/corpus/tokenizer"
  for source in stdlib packages licenses; do
    for split in train:sources validation:validation; do
      store=$STORES/${split%:*}/$source
      [[ -s $store/part-00000.bin ]] && train+=" data.${split#*:}.$source=$store"
    done
  done
  train+=" ${DEMO_MORE:-}"
  step train "$train training.stop_at_step=$STOP"
  step resume "$train"

  # 4. Score it on whole held-out documents, let it write, and put everything on one page.
  step evaluate "llmtrain eval run=$RUN | tee $OUT/eval.txt"
  step generate "llmtrain generate run=$RUN save=true max_new_tokens=96 \
    'prompt=[\"Return the\",\"This function\",\"If the file\"]' | tee $OUT/samples.txt"
  step report "llmtrain report run=$RUN"

  echo
  echo "== summary"
  local total=0
  for name in crawl pipeline train resume evaluate generate report; do
    seconds=$(cat "$OUT/.done/$name")
    total=$((total + seconds))
    printf '%-10s %4d s\n' "$name" "$seconds"
  done
  printf '%-10s %4d s\n\n' total $total
  cat "$OUT/eval.txt"
  printf '\nopen %s/report.html\n' "$RUN"
}

mkdir -p "$OUT/.done"
main
