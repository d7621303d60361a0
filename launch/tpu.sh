#!/usr/bin/env bash
# Train on a TPU VM, one host or a pod, through gcloud: every step of it is one command on all hosts at once.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
launch/tpu.sh STEP --name=NAME --zone=ZONE [--project=PROJECT] [--dry-run] [MORE] [-- FLAGS OF vgen.main]

  create   make the TPU VM          --type=v5p-64  [--version=v2-alpha-tpuv5]  [--spot]
  setup    install on all hosts     [--nfs=HOST:/SHARE], mounted at /mnt/shared
           (copies the last commit of this repository; run it again after a new one)
  train    start in the background  -- --config=configs/muse.py:paper --workdir=/mnt/shared/runs/muse
  logs     follow the first host's output
  stop     save and end (SIGTERM on all hosts); `train` with the same flags goes on from there
  delete   remove the TPU VM

  --dry-run prints the commands instead of running them.  The workdir must be a folder that all hosts see.
TEXT
}
fail() { echo "launch/tpu.sh: $1" >&2; exit 2; }

(($#)) || { usage >&2; exit 2; }
step="$1"
shift
case "$step" in
  create | setup | train | logs | stop | delete) ;;
  -h | --help) usage; exit 0 ;;
  *) fail "the first argument must be create, setup, train, logs, stop or delete, got '$step'" ;;
esac

name= zone= type= version=v2-alpha-tpuv5 nfs= dry= project=() spot=()
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project=("--project=${1#*=}") ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --nfs=*) nfs="${1#*=}"; [[ "$nfs" == *:/* ]] || fail "--nfs looks like 10.0.0.2:/share, got '$nfs'" ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; the flags of vgen.main go behind --" ;;
  esac
  shift
done
[[ "$name" && "$zone" ]] || fail "needs --name=NAME and --zone=ZONE"
[[ "$step" != create || "$type" ]] || fail "create needs --type, for example --type=v5p-64"
[[ "$step" == train || $# == 0 ]] || fail "$step takes nothing behind --"
[[ "$step" != train || $# != 0 ]] || fail "no flags for vgen.main: ... -- --config=configs/muse.py:paper --workdir=DIR"

place=("--zone=$zone" ${project[@]+"${project[@]}"})
run() {
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" "${place[@]}" "${@:2}"; }
everywhere() { tpu ssh --worker=all "--command=$1"; }

case "$step" in
  create) tpu create "--accelerator-type=$type" "--version=$version" ${spot[@]+"${spot[@]}"} ;;
  setup)
    archive="${TMPDIR:-/tmp}/vgen-$$.tar.gz"
    trap 'rm -f "$archive"' EXIT
    run git -C "$here/.." archive --format=tar.gz "--output=$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:vgen.tar.gz" "${place[@]}" --worker=all
    everywhere "mkdir -p vgen && tar -xzf vgen.tar.gz -C vgen"
    # The image's own Python is older than vgen needs; uv brings one.
    everywhere "python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --allow-existing --python 3.12 ~/venv && ~/.local/bin/uv pip install -q --python ~/venv/bin/python -e 'vgen[tpu]'"
    [[ -z "$nfs" ]] || everywhere "sudo apt-get -q install -y nfs-common && sudo mkdir -p /mnt/shared && (mountpoint -q /mnt/shared || sudo mount $nfs /mnt/shared) && sudo chmod a+rwx /mnt/shared"
    ;;
  train)
    printf -v flags '%q ' "$@"
    everywhere "cd vgen && (nohup ~/venv/bin/python launch/worker.py $flags < /dev/null > ~/vgen.log 2>&1 & echo \$! > ~/vgen.pid)"
    ;;
  logs) tpu ssh --worker=0 "--command=tail -n 100 -F vgen.log" ;;
  stop) everywhere "kill -TERM \$(cat vgen.pid)" ;;
  delete) tpu delete ;;
esac
