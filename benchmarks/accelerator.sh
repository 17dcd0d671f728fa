#!/usr/bin/env bash
# Measures speed and accuracy on one GPU or TPU, the most valuable first.
#
#   benchmarks/accelerator.sh [OUT]          into OUT, by default runs/accelerator
#   benchmarks/accelerator.sh --unpack DIR   what benchmarks/pack.py wrote to DIR
#
# Repeat the command to continue: finished parts are skipped, and training runs
# resume. Each part writes OUT/PART.json as soon as it has results, complete when
# its "complete" is true, and OUT/logs/PART.log. The parts, in this order:
#
#   op             the depthwise convolution: error, and speed beside PyTorch's
#   1536_20_train  train step, 224 px, bfloat16, batch 64, beside PyTorch's
#   cifar10_seed0  configs/cifar10.py, 25 epochs, seed 0 (published: 92.60 %)
#   1536_20_infer 768_32_train 768_32_infer 1024_20_train 1024_20_infer
#   cifar10_seed1 cifar10_seed2
#   cifar10_paper  configs/cifar10.py:paper, 200 epochs (published: 95.88 %)
#
#   --seconds N         time for all parts; 480 by default. What does not end in
#                       time is stopped: it goes on when the command is repeated
#   --batch N           of the train steps and inference, 64 by default; 32 for a
#                       GPU of 40 GB
#   --only PART         only this part; may be repeated
#   --redo PART         forgets the part's results and its run; may be repeated
#   --override F=VALUE  a field of the config of the cifar10 parts, such as
#                       model.dtype=float32; may be repeated
#   --tiny              tiny sizes, to try it on a CPU; into runs/accelerator_tiny
#
# $PYTHON is the Python that runs them: by default .venv/bin/python, else
# python3. It needs jax, flax, optax and orbax-checkpoint; --unpack brings the
# rest into runs/packed. PyTorch is measured if it is installed and sees the GPU.
set -uo pipefail

PARTS=(op 1536_20_train cifar10_seed0 1536_20_infer 768_32_train 768_32_infer
  1024_20_train 1024_20_infer cifar10_seed1 cifar10_seed2 cifar10_paper)
GRACE=20 # Seconds in which a part that is stopped can save,
READ=8   # and in which its result is read from its run.
LEAST=30 # Seconds; a part is not started in less.

main() {
  root=$(cd "$(dirname "$0")/.." && pwd)
  local out="" only=() redo=()
  overrides=() seconds=480 batch=64 tiny="" child=""
  while (($#)); do
    case $1 in
    --help | -h)
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --tiny) tiny=1 ;;
    --unpack | --seconds | --batch | --only | --redo | --override)
      (($# > 1)) || fail "$1: needs a value; see --help"
      case $1 in
      --unpack) unpack "$2" ;;
      --seconds) seconds=$2 ;;
      --batch) batch=$2 ;;
      --only) only+=("$2") ;;
      --redo) redo+=("$2") ;;
      --override) overrides+=("--config.$2") ;;
      esac
      shift
      ;;
    -*) fail "$1: no such flag; see --help" ;;
    *)
      [[ -z $out ]] || fail "$1: there is an output folder already, $out"
      out=$1
      ;;
    esac
    shift
  done
  [[ $seconds =~ ^[1-9][0-9]{0,5}$ ]] || fail "--seconds=$seconds: must be a number of seconds"
  [[ $batch =~ ^[1-9][0-9]{0,5}$ ]] || fail "--batch=$batch: must be a number of images"
  local part
  for part in ${only[@]+"${only[@]}"} ${redo[@]+"${redo[@]}"}; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || fail "$part: no such part; there are ${PARTS[*]}"
  done
  out=${out:-$root/runs/accelerator${tiny:+_tiny}}
  mkdir -p "$out/logs" 2>/dev/null || fail "$out: cannot be created"
  out=$(cd "$out" && pwd)
  cd "$root" || exit
  set_environment
  exec 9>"$out/lock"
  flock -n 9 || fail "$out: another run writes there"
  for part in ${redo[@]+"${redo[@]}"}; do
    rm -rf "${out:?}/$part.json" "${out:?}/$part"
  done
  trap 'stop' INT TERM HUP
  for part in "${PARTS[@]}"; do
    if ((${#only[@]} == 0)) || [[ " ${only[*]} " == *" $part "* ]]; then
      run "$part"
    fi
  done
  exit 0 # Bash would read on, in a file that may have changed meanwhile.
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# Ctrl-C: the part saves what it has, and nothing else is started.
# shellcheck disable=SC2317,SC2329  # The trap calls it.
stop() {
  trap '' INT TERM HUP
  if [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null
    wait "$child"
    [[ $part != cifar10_* ]] || read_run
  fi
  echo "stopped in ${part:-the beginning} after $SECONDS s; repeat the command to continue"
  exit 130
}

find_python() {
  python=${PYTHON:-$root/.venv/bin/python}
  [[ -n ${PYTHON:-} || -x $python ]] || python=python3
  command -v "$python" >/dev/null || fail "PYTHON=$python: no such program"
}

unpack() {
  find_python
  # -P: the modules of benchmarks/ must not hide others of their names.
  exec "$python" -P "$root/benchmarks/pack.py" --unpack "$1" "$root/runs/packed"
}

set_environment() {
  find_python
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  local packed=$root/runs/packed needed="jax flax optax ml_collections" site
  site=$packed/site-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "$python: does not run"
  if [[ -d $site && -n $(missing "$needed orbax tensorflow_datasets grain clu array_record") ]]; then
    PYTHONPATH+=:$site
  fi
  if [[ -z ${TFDS_DATA_DIR:-} && -d $packed/tensorflow_datasets ]]; then
    export TFDS_DATA_DIR=$packed/tensorflow_datasets
  fi
  needed=$(missing "$needed") # Only the parts that train need more.
  [[ -z $needed ]] || fail "$python lacks ${needed// /, }; make .venv, or see --help on --unpack"
}

# Those of some modules that Python does not find.
missing() {
  "$python" -c 'import sys, importlib.util
print(*(name for name in sys.argv[1].split() if not importlib.util.find_spec(name)))' "$1"
}

# Sets `command` and `limit`, in seconds, of a part.
describe() {
  local part=$1 sizes=(--batch "$batch") shapes=64x32x32x1536x9,64x32x32x768x7,64x16x16x256x5
  local repeats=5 small=()
  if [[ -n $tiny ]]; then
    shapes=2x8x8x8x5,1x4x4x6x3 repeats=2
    sizes=(--patch_size 4 --kernel_size 3 --image_size 16 --num_classes 10 --batch 2)
    small=(--config.model.dim=8 --config.model.depth=1 --config.batch_size=64
      "--config.data.train_split=train[:512]" "--config.data.eval_split=test[:100]")
  fi
  case $part in
  op)
    limit=130
    command=(benchmarks.implementations --shapes "$shapes" --dtypes "bfloat16,float32"
      --against available --repeats "$repeats")
    ;;
  cifar10_*)
    limit=150
    local config=configs/cifar10.py seed=${part#cifar10_seed} epochs=1
    if [[ $part == cifar10_paper ]]; then
      limit=$seconds config+=:paper seed=0 epochs=2
    fi
    # The authors' script computes in half precision too.
    command=(convmixer_jax.main --config "$config" --workdir "$out/$part" "--config.seed=$seed"
      --config.model.dtype=bfloat16 ${small[@]+"${small[@]}"})
    [[ -z $tiny ]] || command+=("--config.epochs=$epochs")
    command+=(${overrides[@]+"${overrides[@]}"})
    ;;
  *)
    limit=150
    [[ $part != 1536_20_train ]] || limit=250
    local model=convmixer_${part%_*}
    [[ $model != convmixer_1024_20 ]] || model+=_ks9_p14
    [[ -z $tiny ]] || model=convmixer_128_4
    command=(benchmarks.throughput --model "$model" "${sizes[@]}" --mode "${part##*_}"
      --dtype bfloat16 --against available --repeats "$repeats")
    ;;
  esac
  [[ $part == cifar10_* ]] || command+=(--json --out "$out/$part.json")
}

run() {
  part=$1
  local file=$out/$part.json log=$out/logs/$part.log limit command start=$SECONDS result
  if complete "$file"; then
    say "is complete; --redo $part repeats it"
    return
  fi
  describe "$part"
  # One that was stopped gets more time than at first.
  [[ ! -e $file ]] || limit=$((2 * limit))
  local rest=$((seconds - SECONDS - GRACE - READ))
  ((limit <= rest)) || limit=$rest
  if ((limit < LEAST)); then
    say "not started, since there is no time left; repeat the command"
    return
  fi
  # In the background, so that a signal to this script is not delayed.
  timeout --signal=TERM --kill-after="$GRACE" "$limit" \
    "$python" -m "${command[@]}" >"$log" 2>&1 9>&- &
  child=$!
  wait "$child"
  local code=$?
  child=""
  [[ $part != cifar10_* ]] || read_run
  if complete "$file"; then
    result="complete"
    ((code == 0)) || result="complete, but it failed: $(last_line "$log")"
  elif ((code == 124 || code == 137)); then
    result="stopped after $limit s; repeat the command to continue"
  else
    result="FAILED with code $code: $(last_line "$log")"
  fi
  say "$result; took $((SECONDS - start)) s"
}

complete() {
  grep -qs '"complete": true' "$1"
}

# Writes the result of a training run, finished or not, and its line.
read_run() {
  [[ ! -e $out/$part/run.json ]] ||
    JAX_PLATFORMS=cpu "$python" -m benchmarks.trained --workdir "$out/$part" \
      --out "$out/$part.json" 2>&1 9>&- | sed "s/^/$part: /"
}

last_line() {
  grep -v '^ *$' "$1" | tail -n 1 | cut -c 1-200
}

say() {
  echo "$part: $1. Elapsed $SECONDS s, remaining $((seconds > SECONDS ? seconds - SECONDS : 0)) s"
}

main "$@"
