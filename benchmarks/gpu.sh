#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes: build, tests, figures, compute-sanitizer.
# (The limits of the sections below add up to 525 seconds.)
#
#   benchmarks/gpu.sh OUT_DIR [--dry-run]
#
# Builds in place, offline and without isolation, with the python3 on the path (or $PYTHON). Writes into OUT_DIR
# report.json, table.md and logs/*.log, and prints the table last. A failing section stops no other and makes the exit
# status 1. --dry-run goes through every section at small sizes on any machine (Triton kernels interpreted on a CPU)
# and prints the commands that only a GPU machine can run.
set -uo pipefail

usage="usage: benchmarks/gpu.sh OUT_DIR [--dry-run]"
out=${1:?$usage}
dry=${2:-}
[ -z "$dry" ] || [ "$dry" = --dry-run ] || { echo "$usage" >&2; exit 2; }
mkdir -p "$out/logs" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=0
: >"$parts/status.tsv"
export PYTHONUNBUFFERED=1

# section NAME LOG SECONDS COMMAND...: run under a time limit, append to logs/LOG.log, note how it ended.
section() {
  local name=$1 log=$out/logs/$2.log limit=$3 start=$SECONDS status
  shift 3
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  if [ $status -ne 0 ]; then
    failed=1
    [ $status -ne 124 ] || echo "stopped after its $limit seconds" | tee -a "$log"
    tail -n 25 "$log"
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$parts/status.tsv"
}

# On a GPU machine run it, in a dry run say what would be run.
gpu_only() {
  if [ -n "$dry" ]; then
    local name=$1 log=$out/logs/$2.log limit=$3
    shift 3
    echo "== $name, on a GPU machine within $limit s: $*" | tee -a "$log"
    printf '%s\t%s\t%s\n' "$name" "needs a GPU" 0 >>"$parts/status.tsv"
  else
    section "$@"
  fi
}

report=("$python" benchmarks/gpu_report.py)
flags=(--parts "$parts")
[ -z "$dry" ] || flags+=(--dry-run)
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else 90)')

gpu_only build build 75 env "DRE_FAST_CUDA_ARCHS=$arch" "$python" setup.py build_ext --inplace
section environment report 20 "${report[@]}" environment "${flags[@]}"
section ceilings report 20 "${report[@]}" ceilings "${flags[@]}"
section encode report 70 "${report[@]}" encode "${flags[@]}"
section bank report 50 "${report[@]}" bank "${flags[@]}"
section soft report 30 "${report[@]}" soft "${flags[@]}"
section codebook report 20 "${report[@]}" codebook "${flags[@]}"
tests=("$python" -m pytest -m gpu tests --durations=10 -p no:cacheprovider)
if [ -n "$dry" ]; then
  section tests-collected tests 60 "$python" -m pytest -m gpu tests/gpu --collect-only -p no:cacheprovider
fi
gpu_only tests tests 150 "${tests[@]}"
case_command=("${report[@]}" sanitize-case)
[ -z "$dry" ] || section sanitize-case sanitizer 60 "${case_command[@]}"
gpu_only memcheck sanitizer 45 compute-sanitizer --tool memcheck --error-exitcode 1 "${case_command[@]}"
gpu_only racecheck sanitizer 45 compute-sanitizer --tool racecheck --error-exitcode 1 "${case_command[@]}"

echo
"${report[@]}" table --parts "$parts" --out "$out" || failed=1
exit $failed
