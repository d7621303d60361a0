#!/usr/bin/env bash
# Train on several GPU machines under Slurm: one process per GPU, found by JAX through Slurm's variables.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
launch/slurm.sh [--nodes=1] [--gpus=8] [--cpus=12] [--time=24:00:00] [--name=vgen] [--logs=DIR] [--dry-run]
                [--sbatch=FLAG]... -- FLAGS OF vgen.main

  --nodes    machines                    --gpus  per machine             --cpus  cores per GPU
  --logs     folder of the output (default: runs/slurm)
  --sbatch   one more flag for sbatch, e.g. --sbatch=--partition=a100; may be repeated
  --dry-run  print the command instead of running it

Run it in the environment that has vgen installed, with a --workdir that every machine sees.  Two minutes before the
time is over (and when preempted) the processes get SIGTERM: they save and end; the same command goes on from there.

launch/slurm.sh --nodes=2 --gpus=8 -- --config=configs/muse.py:small --workdir=/shared/runs/muse
TEXT
}
fail() { echo "launch/slurm.sh: $1" >&2; exit 2; }
count() { [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a positive number, got '$2'"; }

nodes=1 gpus=8 cpus=12 time=24:00:00 name=vgen logs=runs/slurm dry= extra=()
while (($#)); do
  case "$1" in
    --nodes=*) nodes="${1#*=}"; count --nodes "$nodes" ;;
    --gpus=*) gpus="${1#*=}"; count --gpus "$gpus" ;;
    --cpus=*) cpus="${1#*=}"; count --cpus "$cpus" ;;
    --time=*) time="${1#*=}"; [[ "$time" =~ ^[0-9:-]+$ ]] || fail "--time looks like 24:00:00 or 2-00:00:00, got '$time'" ;;
    --name=*) name="${1#*=}" ;;
    --logs=*) logs="${1#*=}" ;;
    --sbatch=*) extra+=("${1#*=}") ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; the flags of vgen.main go behind --" ;;
  esac
  shift
done
(($#)) || fail "no flags for vgen.main: ... -- --config=configs/muse.py:small --workdir=DIR"

# GPUs per node, not per task: JAX picks GPU number SLURM_LOCALID of those that a process sees.
printf -v step '%q ' srun --kill-on-bad-exit=1 "${PYTHON:-python}" "$here/worker.py" "$@"
command=(
  sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" "--cpus-per-task=$cpus"
  "--time=$time" "--output=$logs/%x-%j.log" --open-mode=append --signal=TERM@120 --requeue
  ${extra[@]+"${extra[@]}"} "--wrap=$step"
)
if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  command -v sbatch >/dev/null || fail "there is no sbatch here: run this on a machine of the cluster"
  mkdir -p "$logs"
  "${command[@]}"
fi
