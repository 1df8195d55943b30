#!/usr/bin/env bash
# Every test, in two processes side by side: those that start ranks wait for one another most of the time, the others
# keep one core busy. The second one's output is shown when both have ended. Exit status 1 if either failed.
#   bash launch/test.sh            (or: make test)
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
ranks=(tests/distributed tests/property/test_layouts.py tests/end_to_end/test_engines.py)
# Two processes on two cores: more threads would only wait for each other. Some images forbid Python to keep byte code:
# then every process that a test starts would compile torch again, ten seconds of it.
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE
log=$(mktemp)
trap 'kill "$others" 2> /dev/null; rm -f "$log"' EXIT

"$python" -m pytest tests "${ranks[@]/#/--ignore=}" > "$log" 2>&1 &
others=$!
"$python" -m pytest "${ranks[@]}"
ranks_status=$?
wait "$others"
others_status=$?
cat "$log"
[ "$ranks_status" -eq 0 ] && [ "$others_status" -eq 0 ]
