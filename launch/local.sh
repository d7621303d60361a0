#!/usr/bin/env bash
# Several processes with several emulated devices each, on this machine's CPU: what a pod does, to try it.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
launch/local.sh [--processes=2] [--devices=1] [--port=PORT] [--dry-run] -- FLAGS OF vgen.main

  --processes  how many processes        --devices  emulated CPU devices of each
  --port       of process 0 (default: a random one)
  --dry-run    print the commands instead of running them

launch/local.sh --processes=2 --devices=4 -- --config=configs/muse.py:tiny --workdir=runs/pod --stage=tokenizer
TEXT
}
fail() { echo "launch/local.sh: $1" >&2; exit 2; }
count() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a positive number, got '$2'"; }

processes=2 devices=1 port=$((20000 + RANDOM % 20000)) dry=
while (($#)); do
  case "$1" in
    --processes=*) processes="${1#*=}"; count --processes "$processes" ;;
    --devices=*) devices="${1#*=}"; count --devices "$devices" ;;
    --port=*) port="${1#*=}"; count --port "$port" ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; the flags of vgen.main go behind --" ;;
  esac
  shift
done
(($#)) || fail "no flags for vgen.main: ... -- --config=configs/muse.py --workdir=DIR"

pids=() interrupted=
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap 'interrupted=1; stop' TERM
trap 'interrupted=1' INT # Ctrl-C in a terminal reaches the processes by itself

for ((i = 0; i < processes; i++)); do
  command=(
    env JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "JAX_COORDINATOR_ADDRESS=localhost:$port" "VGEN_NUM_PROCESSES=$processes" "VGEN_PROCESS_ID=$i"
    "${PYTHON:-python}" "$here/worker.py" "$@"
  )
  if [[ $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

code=0 left=${#pids[@]}
while ((left)); do
  one=0
  wait -n || one=$?
  if [[ $interrupted ]]; then # a signal ended `wait`, not a process
    interrupted=
    continue
  fi
  ((one != 127)) || break # no process is left
  left=$((left - 1))
  if ((one && !code)); then
    code=$one
    stop # the others would wait for the one that failed
  fi
done
exit "$code"
