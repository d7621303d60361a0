#!/usr/bin/env bash
# Several processes with several emulated devices each, on this machine's CPU: what a pod does, to try it.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
launch/local_multiprocess.sh [--processes=2] [--devices=1] [--port=PORT] [--dry_run] -- FLAGS OF vgen.main

  --processes  how many processes        --devices  emulated CPU devices of each
  --port       of process 0 (default: a random one)
  --dry_run    print the commands instead of running them

Every line of process i begins with [i]. When one process fails, the others are stopped; the exit code is its own.

launch/local_multiprocess.sh --processes=2 --devices=4 -- --config=configs/muse.py:tiny --workdir=runs/pod
TEXT
}
fail() { echo "launch/local_multiprocess.sh: $1" >&2; exit 2; }
count() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a positive number, got '$2'"; }

processes=2 devices=1 port=$((20000 + RANDOM % 20000)) dry=
while (($#)); do
  case "$1" in
    --processes=*) processes="${1#*=}"; count --processes "$processes" ;;
    --devices=*) devices="${1#*=}"; count --devices "$devices" ;;
    --port=*) port="${1#*=}"; count --port "$port" ;;
    --dry_run | --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '${1%%=*}'; the flags of vgen.main go behind --" ;;
  esac
  shift
done
(($#)) || fail "no flags for vgen.main: ... -- --config=configs/muse.py --workdir=DIR"

pids=() left=0 interrupted='' pipes=''
stop() { ((!${#pids[@]})) || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap 'interrupted=1; stop' TERM
trap 'interrupted=1' INT # Ctrl-C in a terminal reaches the processes by itself
if [[ ! $dry ]]; then
  pipes="$(mktemp -d)"
  trap 'rm -rf "$pipes"' EXIT
fi

# Put [i] before every line. It outlives a signal to the whole group: the processes still tell how they end.
prefix() {
  trap '' INT TERM
  local line
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

# A pipe with its ends `from` and `to`, opened through `both` because one end alone would wait for the other.
new_pipe() {
  mkfifo "$pipes/pipe"
  exec {both}<>"$pipes/pipe"
  exec {from}<"$pipes/pipe"
  exec {to}>"$pipes/pipe"
  exec {both}>&-
  rm "$pipes/pipe"
}

for ((i = 0; i < processes; i++)); do
  command=(
    env JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    "JAX_COORDINATOR_ADDRESS=localhost:$port" "VGEN_NUM_PROCESSES=$processes" "VGEN_PROCESS_ID=$i"
    "${PYTHON:-python}" "$here/worker.py" "$@"
  )
  if [[ $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  new_pipe
  prefix "$i" <&"$from" {to}>&- &
  exec {from}<&- {out}>&"$to" {to}>&-
  new_pipe
  prefix "$i" <&"$from" >&2 {out}>&- {to}>&- &
  "${command[@]}" >&"$out" 2>&"$to" {from}<&- {out}>&- {to}>&- &
  pids+=($!)
  exec {from}<&- {out}>&- {to}>&-
  left=$((left + 3))
done

code=0
while ((left)); do # readers count too: their code is 0, and nothing that was written is lost
  one=0
  wait -n || one=$?
  if [[ $interrupted ]]; then # a signal ended `wait`, not a process
    interrupted=
    continue
  fi
  left=$((left - 1))
  if ((one && !code)); then
    code=$one
    stop # the others would wait for the one that failed
  fi
done
exit "$code"
