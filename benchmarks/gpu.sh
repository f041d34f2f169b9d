#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes: build, figures, counters, tests, compute-sanitizer.
# (The limits below add up to 535 seconds: tests and sanitizer run side by side, after everything that is timed.)
#
#   benchmarks/gpu.sh OUT_DIR [--dry-run]
#
# Builds in place, offline and without isolation, with the python3 on the path (or $PYTHON). Writes into OUT_DIR
# report.json, table.md, ncu.csv (hardware counters) and logs/*.log, and prints the table last. A failing section stops no
# other and makes the exit status 1; counters that this machine does not give are noted, not failed. --dry-run goes through
# every section at small sizes on any machine (Triton kernels interpreted on a CPU) and prints the commands that only a
# GPU machine can run.
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
: >"$parts/status.tsv"
rm -f "$out/ncu.csv"
export PYTHONUNBUFFERED=1

# note NAME STATUS SECONDS: how a section ended.
note() {
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$parts/status.tsv"
}

# section NAME LOG SECONDS COMMAND...: run under a time limit, append to logs/LOG.log, note how it ended.
section() {
  local name=$1 log=$out/logs/$2.log limit=$3 start=$SECONDS status
  shift 3
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  if [ $status -ne 0 ]; then
    [ $status -ne 124 ] || echo "stopped after its $limit seconds" | tee -a "$log"
    tail -n 25 "$log"
  fi
  note "$name" "$status" "$((SECONDS - start))"
  return $status
}

# On a GPU machine run it, in a dry run say what would be run.
gpu_only() {
  if [ -n "$dry" ]; then
    local name=$1 log=$out/logs/$2.log limit=$3
    shift 3
    echo "== $name, on a GPU machine within $limit s: $*" | tee -a "$log"
    note "$name" "needs a GPU" 0
  else
    section "$@"
  fi
}

# Hardware counters of single launches. Many machines withhold them: then that is what the report says.
counters() {
  local start=$SECONDS log=$out/logs/$2.log status
  if [ -n "$dry" ]; then
    gpu_only "$@"
    return
  fi
  if ! command -v ncu >/dev/null; then
    note "$1" "no ncu here" 0
    return
  fi
  section "$@"
  status=$?
  # What ncu itself says goes to its CSV file, before the launches.
  if ! grep -q '^"[0-9]' "$out/ncu.csv" 2>/dev/null && { [ $status -eq 0 ] ||
    grep -qE 'ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize the profiler' "$log" "$out/ncu.csv"; }; then
    sed -i '$d' "$parts/status.tsv"
    note "$1" "no counters given" "$((SECONDS - start))"
  fi
}

report=("$python" benchmarks/gpu_report.py)
flags=(--parts "$parts")
[ -z "$dry" ] || flags+=(--dry-run)
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else 90)')

gpu_only build build 65 env "DRE_FAST_CUDA_ARCHS=$arch" "$python" setup.py build_ext --inplace
section environment report 15 "${report[@]}" environment "${flags[@]}"
section ceilings report 15 "${report[@]}" ceilings "${flags[@]}"
section encode report 65 "${report[@]}" encode "${flags[@]}"
section retrieve report 30 "${report[@]}" retrieve "${flags[@]}"
section soft report 45 "${report[@]}" soft "${flags[@]}"
section contrast report 20 "${report[@]}" contrast "${flags[@]}"
section bank report 45 "${report[@]}" bank "${flags[@]}"
section codebook report 15 "${report[@]}" codebook "${flags[@]}"
section training report 35 "${report[@]}" training "${flags[@]}"
section kernels report 25 "${report[@]}" kernels "${flags[@]}"
# The clocks are left alone, so that these are the launches that were timed; the first calls, which compile, are not watched.
counters counters report 45 ncu --csv --page raw --log-file "$out/ncu.csv" --clock-control none --profile-from-start off \
  --section SpeedOfLight --section ComputeWorkloadAnalysis --metrics dram__bytes_read.sum,dram__bytes_write.sum \
  "${report[@]}" profile-case

case_command=("${report[@]}" sanitize-case)
sanitizer() {
  gpu_only memcheck sanitizer 57 compute-sanitizer --tool memcheck --error-exitcode 1 "${case_command[@]}"
  gpu_only racecheck sanitizer 57 compute-sanitizer --tool racecheck --error-exitcode 1 "${case_command[@]}"
}
# The kernels' own tests are those that the interpreter runs elsewhere; compiling for them keeps a core busy.
tests=("$python" -m pytest -m gpu --durations=10 -p no:cacheprovider)
# and there are hundreds of them: several processes share each half where pytest-xdist is there
! "$python" -c 'import xdist' 2>/dev/null || tests+=(-n "$((1 + $(nproc) / 3))")
if [ -n "$dry" ]; then
  section tests-collected tests 60 "$python" -m pytest -m gpu tests/gpu --collect-only -p no:cacheprovider
  section sanitize-case sanitizer 60 "${case_command[@]}"
fi
sanitizer &
gpu_only tests-kernels kernels 115 "${tests[@]}" tests/interpreter &
gpu_only tests tests 115 "${tests[@]}" tests --ignore=tests/interpreter
wait

echo
"${report[@]}" table --parts "$parts" --out "$out" || exit 1
! grep -qP '^[^\t]+\t[1-9]\d*\t' "$parts/status.tsv"
