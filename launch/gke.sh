#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster, through kubectl: a JobSet with one pod per host of the slice.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
launch/gke.sh STEP --name=NAME [--namespace=default] [--context=CONTEXT] [--dry_run] [MORE] [-- FLAGS OF vgen.main]

  train    start a JobSet; the flags of vgen.main go behind --
    --image        what launch/gke/Dockerfile builds     --accelerator  as the nodes have it, e.g. tpu-v5p-slice
    --topology     of the slice, e.g. 4x4x4              --chips        of one host (default: 4)
    --spot         on spot nodes                         --claim        a volume claim, mounted at /mnt/shared
    --secret       name of a Kubernetes Secret whose keys become environment variables, such as HF_TOKEN
    --restarts     after failures and preemptions (default: 20); a mistake in the flags, code 2, is not restarted
    --grace        seconds to save after SIGTERM (default: 600)
  status   the JobSet and its pods
  logs     follow the first host's output
  delete   save and end, and remove the JobSet; `train` with the same flags goes on from there

  --dry_run prints the YAML and the commands instead of running them.  Needs the JobSet controller in the cluster.
TEXT
}
say() { echo "launch/gke.sh: $1" >&2; }
fail() { say "$1"; exit 2; }

(($#)) || { usage >&2; exit 2; }
step="$1"
shift
case "$step" in
  train | status | logs | delete) ;;
  -h | --help) usage; exit 0 ;;
  *) fail "the first argument must be train, status, logs or delete, got '$step'" ;;
esac

name='' dry='' where=(--namespace=default) values=()
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}"; values+=("$1") ;;
    --namespace=*) where[0]="$1"; values+=("$1") ;;
    --context=*) where+=("$1") ;;
    --image=* | --accelerator=* | --topology=* | --chips=* | --spot | --claim=* | --secret=* | --restarts=* | --grace=*)
      [[ "$step" == train ]] || fail "$step does not take ${1%%=*}"
      values+=("$1") ;;
    --dry_run | --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '${1%%=*}'; the flags of vgen.main go behind --" ;;
  esac
  shift
done
[[ "$name" ]] || fail "needs --name=NAME"
[[ "$step" == train || $# == 0 ]] || fail "$step takes nothing behind --"
[[ $dry ]] || command -v kubectl >/dev/null || fail "there is no kubectl here: https://kubernetes.io/docs/tasks/tools"

cluster() {
  if [[ $dry ]]; then
    printf '%q ' kubectl "${where[@]}" "$@"
    echo
  else
    kubectl "${where[@]}" "$@"
  fi
}
pods="--selector=jobset.sigs.k8s.io/jobset-name=$name"

case "$step" in
  train)
    yaml="$("${PYTHON:-python3}" "$here/gke/render.py" "${values[@]}" -- "$@")"
    if [[ $dry ]]; then
      printf '%s\n' "$yaml"
    elif cluster get jobset "$name" >/dev/null 2>&1; then
      fail "the JobSet $name exists already: see its status, remove it with delete, or take another --name"
    fi
    if [[ $dry ]]; then cluster apply --filename=-; else cluster apply --filename=- <<<"$yaml"; fi ;;
  status) cluster get jobset "$name"; cluster get pods --output=wide "$pods" ;;
  logs) cluster logs --follow --tail=100 "$pods,batch.kubernetes.io/job-completion-index=0" ;;
  delete) cluster delete jobset "$name" ;;
esac
