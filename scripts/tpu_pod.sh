#!/usr/bin/env bash
# Runs one command on all workers of a TPU VM, or pod, through gcloud.
#
#   scripts/tpu_pod.sh NAME setup       copies this checkout and sets up .venv
#   scripts/tpu_pod.sh NAME run CMD...  runs CMD in the checkout on all workers
#   scripts/tpu_pod.sh NAME sweep SWEEP --root gs://BUCKET/PATH ...
#                                       trains a sweep on all workers, a run a
#                                       chip: experiments.run with these flags
#   scripts/tpu_pod.sh NAME log [N]     follows the output of worker N (0)
#   scripts/tpu_pod.sh NAME stop        sends SIGTERM: runs save and end
#
# Zone and project come from gcloud config, or from $ZONE and $PROJECT. Example:
#
#   scripts/tpu_pod.sh pod setup
#   scripts/tpu_pod.sh pod run python -m convmixer_jax.main --distributed \
#       --config configs/imagenet.py --workdir gs://bucket/runs/imagenet
#   scripts/tpu_pod.sh pod sweep patch_kernel --root gs://bucket/runs
#
# A run continues when this terminal closes. Only committed files are copied.
set -euo pipefail

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
}

main() {
  if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    usage
    exit 0
  fi
  if (($# < 2)); then
    fail "give NAME and one of setup, run, sweep, log, stop; see --help"
  fi
  command -v gcloud >/dev/null || fail "gcloud: not found; see https://cloud.google.com/sdk"
  local tpu=$1 action=$2
  shift 2
  local where=()
  [[ -z ${ZONE:-} ]] || where+=("--zone=$ZONE")
  [[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")
  # shellcheck disable=SC2016  # What is in single quotes is expanded there.
  case $action in
  setup) setup ;;
  run)
    (($#)) || fail "run: give a command"
    run "$@"
    ;;
  sweep)
    # Without a root in a bucket each worker would train all runs.
    [[ " $* " =~ " --root"[\ =][a-z0-9]+:// ]] || fail "sweep: give a sweep and --root gs://BUCKET/PATH"
    run python -m experiments.run "$@"
    ;;
  log)
    [[ ${1:-0} =~ ^[0-9]+$ ]] || fail "log $1: must be the number of a worker"
    on_workers "${1:-0}" "tail -n +1 -F convmixer_jax/pod.log"
    ;;
  # The command leads its own process group; the whole group gets the signal.
  stop) on_workers all 'kill -TERM -- "-$(cat convmixer_jax/pod.pid)"' ;;
  *) fail "$action: must be setup, run, sweep, log or stop" ;;
  esac
}

fail() {
  echo "error: $1" >&2
  exit 2
}

on_workers() {
  gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" "--worker=$1" --command="$2"
}

setup() {
  local root archive
  root=$(cd "$(dirname "$0")/.." && pwd)
  archive=$(mktemp -d)
  # shellcheck disable=SC2064  # Expand $archive now.
  trap "rm -rf '$archive'" EXIT
  git -C "$root" archive --prefix=convmixer_jax/ -o "$archive/code.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$archive/code.tar.gz" "$tpu:convmixer_jax.tar.gz" \
    "${where[@]}" --worker=all
  # Ubuntu 22.04 packages Python 3.11; later releases have a newer default.
  on_workers all "set -e
    sudo apt-get update -q
    sudo apt-get install -yq g++ make python3.11-venv ||
      sudo apt-get install -yq g++ make python3-venv
    tar xzf convmixer_jax.tar.gz
    cd convmixer_jax
    make .venv
    .venv/bin/pip install --quiet -c requirements.txt 'jax[tpu]' gcsfs"
}

run() {
  local command
  command=$(printf '%q ' "$@")
  # setsid makes a process group, for stop; nohup lets it outlive the ssh.
  on_workers all "cd convmixer_jax && PATH=\$PWD/.venv/bin:\$PATH && {
    nohup setsid bash -c 'echo \$\$ >pod.pid; exec \"\$@\"' - $command >pod.log 2>&1 </dev/null &
  }"
}

main "$@"
