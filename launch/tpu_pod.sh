#!/usr/bin/env bash
# Train on a TPU VM, one host or a pod, through gcloud: every step of it is one command on all hosts at once.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh STEP --name=NAME --zone=ZONE[,ZONE]... [--project=PROJECT] [--dry_run] [MORE] [-- FLAGS OF vgen.main]

  create   ask for the TPU VM       --type=v5p-64  [--version=VERSION]  [--spot]
           as a queued resource     [--valid-until-duration=6h], after which the request ends
           or at once               [--direct]
           where a zone has no room the next one is asked, then all again: [--attempts=5]  [--backoff=60] seconds
  setup    install on all hosts     [--nfs=HOST:/SHARE], mounted at /mnt/shared
           (copies the last commit of this repository; run it again after a new one)
  train    start in the background  [--env=NAME]...  -- --config=configs/muse.py:paper --workdir=/mnt/shared/runs/muse
           and stay, as watch does  [--watch] and the flags of watch
  watch    start again what dies: a process that fails is started again with the same flags and goes on from the
           newest checkpoint; a TPU VM that was preempted is made and set up again first.  Ends once all processes
           have ended well, or with 2 after a mistake in the flags.
           flags of create, setup and train  [--restarts=20]  [--poll=60] seconds
  up       create, wait until it is there, setup, train and watch in one; flags of all of them
  logs     follow the first host's output
  status   the TPU VM and the process on each of its hosts
  stop     save and end (SIGTERM on all hosts); `train` with the same flags goes on from there
  delete   remove the TPU VM and its request

  --env      hand on a variable, such as HF_TOKEN; its value goes through ssh's input and is never shown
  --dry_run  print the commands instead of running them
The workdir must be a folder that all hosts see.
TEXT
}
say() { echo "launch/tpu_pod.sh: $1" >&2; }
fail() { say "$1"; exit 2; } # a mistake of the caller
die() { say "$1"; exit 1; }  # the world's
count() { [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 must be a number, got '$2'"; }

(($#)) || { usage >&2; exit 2; }
step="$1"
shift
case "$step" in
  create | setup | train | watch | up | logs | status | stop | delete) ;;
  -h | --help) usage; exit 0 ;;
  *) fail "the first argument must be create, setup, train, watch, up, logs, status, stop or delete, got '$step'" ;;
esac

name='' zone='' type='' version='' valid='' direct='' nfs='' watch='' dry='' project=() spot=() variables=()
attempts=5 backoff=60 restarts=20 poll=60
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project=("--project=${1#*=}") ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --valid-until-duration=*) valid="${1#*=}" ;;
    --direct) direct=1 ;;
    --attempts=*) attempts="${1#*=}"; count --attempts "$attempts" ;;
    --backoff=*) backoff="${1#*=}"; count --backoff "$backoff" ;;
    --nfs=*) nfs="${1#*=}"; [[ "$nfs" == *:/* ]] || fail "--nfs looks like 10.0.0.2:/share, got '$nfs'" ;;
    --env=*) # what is wrong here may be a secret: it is not repeated
      [[ "$1" =~ ^--env=[A-Za-z_][A-Za-z_0-9]*$ ]] || fail "--env takes the name of a variable, without its value"
      variables+=("${1#*=}") ;;
    --watch) watch=1 ;;
    --restarts=*) restarts="${1#*=}"; count --restarts "$restarts" ;;
    --poll=*) poll="${1#*=}"; count --poll "$poll" ;;
    --dry_run | --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '${1%%=*}'; the flags of vgen.main go behind --" ;;
  esac
  shift
done
[[ "$name" && "$zone" ]] || fail "needs --name=NAME and --zone=ZONE"
case "$step" in
  train | watch | up) (($#)) || fail "no flags for vgen.main: ... -- --config=configs/muse.py:paper --workdir=DIR" ;;
  *) [[ $# == 0 ]] || fail "$step takes nothing behind --" ;;
esac
[[ "$step" == train && ! $watch ]] || case "$step" in
  create | train | watch | up) [[ "$type" ]] || fail "$step${watch:+ --watch} needs --type, such as --type=v5p-64" ;;
esac
for variable in ${variables[@]+"${variables[@]}"}; do
  [[ $dry || "${!variable:-}" ]] || fail "--env names a variable that is not set here, or empty"
done
IFS=, read -ra zones <<<"$zone"
zone="${zones[0]}"
if [[ ! $version ]]; then # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v[234]-* | '') version=tpu-ubuntu2204-base ;;
    *) fail "--type=$type needs --version, the runtime version of its TPU VM" ;;
  esac
fi
[[ $dry ]] || command -v gcloud >/dev/null || fail "there is no gcloud here: https://cloud.google.com/sdk/docs/install"
errors="$(mktemp)"
archive="$errors.tar.gz"
trap 'rm -f "$errors" "$archive"' EXIT

# --- gcloud ---------------------------------------------------------------------------------------------------------

run() {
  if [[ $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" "--zone=$zone" ${project[@]+"${project[@]}"} "${@:2}"; }
queued() {
  run gcloud compute tpus queued-resources "$1" "$name" "--zone=$zone" ${project[@]+"${project[@]}"} "${@:2}"
}
everywhere() { tpu ssh --worker=all "--command=$1" </dev/null; }
last_error() { sed '/^ *$/d' "$errors" | tail -n 1; }
# Google calls a quota an exhausted resource, too, but waiting does not raise it.
no_room() {
  grep -Eiq 'RESOURCE_EXHAUSTED|no more capacity|insufficient (reserved )?capacity|stockout|POOL_EXHAUSTED' "$errors" &&
    ! grep -iq quota "$errors"
}

# "STATE HOSTS" of the TPU VM in $zone: GONE where there is none, UNKNOWN where gcloud cannot tell.
node() {
  if tpu describe '--format=value(state,networkEndpoints.len())' 2>"$errors"; then
    return
  elif grep -Eiq 'NOT_FOUND|not found' "$errors"; then
    echo GONE 0
  else
    echo UNKNOWN 0
  fi
}
request() { queued describe "--format=value(state.state)" 2>"$errors" || true; } # '' where there is none

# Go to the zone that has the TPU VM or a request for it.
find_zone() {
  ((${#zones[@]} > 1)) && [[ ! $dry ]] || return 0
  local state
  for zone in "${zones[@]}"; do
    read -r state _ < <(node)
    [[ "$state" == GONE && ! "$(request)" ]] || return 0
  done
  die "there is no TPU VM $name in ${zones[*]}"
}

# --- create ---------------------------------------------------------------------------------------------------------

refuse_existing() {
  [[ ! $dry ]] || return 0
  for zone in "${zones[@]}"; do
    if tpu describe >/dev/null 2>&1 || queued describe >/dev/null 2>&1; then
      fail "$name exists in $zone already: train on it, remove it with delete, or take another --name"
    fi
  done
}

# Ask one zone; 1 where it has no room.
ask() {
  if [[ $direct ]]; then
    tpu create "--accelerator-type=$type" "--version=$version" ${spot[@]+"${spot[@]}"} 2>"$errors" && return
  else
    queued create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot[@]+"${spot[@]}"} \
      ${valid:+"--valid-until-duration=$valid"} 2>"$errors" && return
  fi
  no_room || die "$name could not be made in $zone: $(last_error)"
  say "$zone has no room for $type"
  return 1
}

# Wait until the TPU VM is there; 1 where its request has ended without it.
arrived() {
  local state
  while [[ ! $dry ]]; do
    read -r state _ < <(node)
    case "$state" in
      READY) return 0 ;;
      PREEMPTED | TERMINATED) say "$name in $zone is $state already" && remove && return 1 ;;
    esac
    if [[ ! $direct ]]; then
      state="$(request)"
      case "$state" in
        FAILED | SUSPENDING | SUSPENDED)
          queued describe '--format=value(state.failedData.error.message)' >"$errors" 2>&1 || true
          [[ "$state" != FAILED || $valid ]] || no_room || die "the request for $name in $zone failed: $(last_error)"
          say "the request for $name in $zone has ended ($state)"
          remove
          return 1 ;;
      esac
    fi
    sleep "$poll"
  done
}

# Make the TPU VM in the first zone that has room; ask all again after a pause, each time a longer one.
# The argument is what else has to hold, `arrived` or nothing.
acquire() {
  local attempt pause=$backoff
  for ((attempt = 1; ; attempt++)); do
    for zone in "${zones[@]}"; do
      if ask && "${1:-true}"; then return; fi
    done
    ((attempt < attempts)) || die "no room for $type in ${zones[*]}, asked $attempts times"
    say "asking again in $pause s"
    sleep "$pause"
    pause=$((pause < 1800 ? 2 * pause : 3600))
  done
}

remove() {
  if [[ $direct ]]; then tpu delete --quiet; else queued delete --force --quiet; fi
}

# --- on the hosts ---------------------------------------------------------------------------------------------------

setup() {
  run git -C "$here/.." archive --format=tar.gz "--output=$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:vgen.tar.gz" "--zone=$zone" \
      ${project[@]+"${project[@]}"} --worker=all </dev/null &&
    everywhere "mkdir -p vgen && tar -xzf vgen.tar.gz -C vgen" || return
  # The image's own Python is older than vgen needs; uv brings one.
  everywhere "python3 -m pip install -q --user uv && \
~/.local/bin/uv venv -q --allow-existing --python 3.12 ~/venv && \
~/.local/bin/uv pip install -q --python ~/venv/bin/python -e 'vgen[tpu]'" || return
  [[ -z "$nfs" ]] || everywhere "sudo apt-get -q install -y nfs-common && sudo mkdir -p /mnt/shared && \
(mountpoint -q /mnt/shared || sudo mount $nfs /mnt/shared) && sudo chmod a+rwx /mnt/shared"
}

# A host holds vgen.log, vgen.pid and, once the process has ended, its exit code in vgen.exit.
# shellcheck disable=SC2016 # the host expands it
alive='grep -qsa launch/worker.py "/proc/$(cat ~/vgen.pid 2>/dev/null)/cmdline"'

# Every host gets the variables through an ssh of its own (all at once would share one input), into a file that only
# its owner reads and that is gone before vgen starts.
send_variables() {
  local hosts i value jobs=()
  if [[ $dry ]]; then
    printf '%s' "$(tpu ssh --worker=EACH '--command=umask 077; cat > ~/vgen.env; test -s ~/vgen.env')"
    echo " # its input: the values of ${variables[*]}"
    return
  fi
  read -r _ hosts < <(node)
  ((hosts)) || return
  for ((i = 0; i < hosts; i++)); do
    for value in "${variables[@]}"; do
      printf '%s=%q\n' "$value" "${!value}"
    done | tpu ssh "--worker=$i" '--command=umask 077; cat > ~/vgen.env; test -s ~/vgen.env' &
    jobs+=($!)
  done
  for i in "${jobs[@]}"; do wait "$i" || return; done
}

# Start "$@", the flags of vgen.main, on all hosts.
begin() {
  local flags
  printf -v flags '%q ' "$@"
  ((!${#variables[@]})) || send_variables || return
  everywhere "if $alive; then rm -f ~/vgen.env; echo 'vgen runs here already: stop it first' >&2; exit 1; fi; \
cd ~/vgen && rm -f ~/vgen.pid ~/vgen.exit && { (trap '' HUP; \
if [ -f ~/vgen.env ]; then set -a; . ~/vgen.env; set +a; rm -f ~/vgen.env; fi; \
~/venv/bin/python launch/worker.py $flags& echo \$! > ~/vgen.pid; wait \$!; echo \$? > ~/vgen.exit) \
< /dev/null >> ~/vgen.log 2>&1 & } && until [ -s ~/vgen.pid ]; do sleep 0.1; done"
}

# One line per host: vgen-worker running, vgen-worker exit CODE, or vgen-worker lost (the host has started anew).
tell="[ -s ~/vgen.exit ] || $alive || sleep 1; if [ -s ~/vgen.exit ]; then echo vgen-worker exit \$(cat ~/vgen.exit); \
elif $alive; then echo vgen-worker running; else echo vgen-worker lost; fi"
# The other processes wait for the one that died and cannot save: those that do not end in 20 s are killed.
halt="if $alive; then kill -TERM \$(cat ~/vgen.pid); for i in \$(seq 100); do $alive || break; sleep 0.2; done; \
if $alive; then kill -KILL \$(cat ~/vgen.pid); fi; fi; true"

# --- watch ----------------------------------------------------------------------------------------------------------

# Set `trouble` to '' or to what is wrong now, `lost` where the TPU VM has to be made again; count in `ended` how often
# all processes had ended well, in `silent` how often a host did not answer.
look() {
  local state hosts answers
  trouble='' lost=''
  read -r state hosts < <(node)
  case "$state" in
    READY) ;;
    PREEMPTED | TERMINATED) trouble="the TPU VM is $state" lost=1 ;;
    GONE)
      state="$(request)" # after a preemption the request is still there; somebody's `delete` removes it as well
      [[ "$state" ]] || die "there is no TPU VM $name any more"
      trouble="the TPU VM was taken away, its request is $state" lost=1 ;;
    *) ended=0 && return ;; # under repair, or unknown for now
  esac
  [[ ! $lost ]] || return 0
  answers="$(everywhere "$tell" 2>"$errors" | sed -n 's/^vgen-worker //p')" || true
  if ((!hosts || $(grep -c . <<<"$answers") < hosts)); then
    silent=$((silent + 1)) ended=0
    ((silent < 3)) || trouble="a host does not answer" lost=1
    return
  fi
  silent=0
  if grep -qx 'exit 2' <<<"$answers"; then
    everywhere "$halt" || true
    fail "vgen was given something wrong and ended with code 2: see logs"
  elif grep -qx lost <<<"$answers"; then
    trouble="a host has started anew"
  elif grep -qvx -e running -e 'exit 0' <<<"$answers"; then
    trouble="a process ended with code $(sed -n 's/^exit \([^0].*\)/\1/p' <<<"$answers" | head -n 1)"
  elif grep -qx running <<<"$answers"; then
    ended=0
  else
    ended=$((ended + 1))
  fi
}

# Keep "$@", the flags of vgen.main, running on all hosts until they have ended well.
watch() {
  local trouble lost ended=0 silent=0 left=$restarts pause=$backoff since=$SECONDS ready=1
  if [[ $dry ]]; then
    node
    everywhere "$tell"
    return
  fi
  while true; do
    sleep "$poll"
    look
    # Twice, because a process that is preempted saves and ends well, a little before its TPU VM is gone.
    ((ended < 2)) || { say "all processes have ended well"; return; }
    [[ "$trouble" ]] || continue
    ((left-- > 0)) || die "$trouble, and it was started again $restarts times already"
    ((SECONDS - since < 600)) || pause=$backoff
    say "$trouble: starting again in $pause s"
    sleep "$pause"
    pause=$((pause < 1800 ? 2 * pause : 3600)) since=$SECONDS ended=0 silent=0
    if [[ $lost ]]; then
      ready=''
      remove || continue # what went wrong shows at the next look
      acquire arrived
    else
      everywhere "$halt" || true
    fi
    [[ $ready ]] || { setup && ready=1; } || continue
    begin "$@" || true
  done
}

case "$step" in
  create)
    refuse_existing
    acquire
    [[ $dry || $direct ]] || say "asked for $name in $zone: status tells when it is there" ;;
  up)
    refuse_existing
    acquire arrived
    setup || { say "setting up again in $backoff s"; sleep "$backoff"; setup; } || die "could not set up $name in $zone"
    begin "$@" || die "could not start on $name in $zone"
    watch "$@" ;;
  setup) find_zone; setup ;;
  train)
    find_zone
    begin "$@"
    [[ ! $watch ]] || watch "$@" ;;
  watch) find_zone; watch "$@" ;;
  logs) find_zone; tpu ssh --worker=0 "--command=tail -n 100 -F vgen.log" ;;
  status)
    find_zone
    [[ $direct || $dry ]] || echo "request: $(request)"
    if [[ $dry ]]; then node; else read -r state hosts < <(node) && echo "TPU VM: $state, $hosts hosts"; fi
    [[ ! $dry && "$state" != READY ]] || everywhere "$tell" ;;
  stop) find_zone; everywhere "if $alive; then kill -TERM \$(cat ~/vgen.pid); fi" ;;
  delete)
    find_zone
    [[ $dry || "$(request)" ]] || direct=1
    remove ;;
esac
