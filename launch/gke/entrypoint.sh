#!/usr/bin/env bash
# What a pod runs: one process of vgen. A pod that is told to stop ends with 143, not with vgen's 0, so that the
# JobSet starts it again elsewhere instead of taking the run for finished.
set -euo pipefail
"${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/../worker.py" "$@" &
process=$! stopped=''
trap 'stopped=1; kill -TERM "$process" 2>/dev/null || true' TERM INT
while true; do
  code=0 before="$stopped"
  wait "$process" || code=$?
  [[ "$stopped" == "$before" ]] && break # else the signal ended `wait`, not vgen
done
[[ ! $stopped ]] || code=143
exit "$code"
