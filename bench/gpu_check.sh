#!/usr/bin/env bash
# Check and measure the kernels on a machine with a GPU: about ten minutes. --help lists the parts.
#
#   bench/gpu_check.sh OUT                 all parts
#   bench/gpu_check.sh OUT --only smoke    one part, at most four minutes
#
# OUT receives CSV files, a log and the state from which another call with the same OUT resumes. The script needs no
# network and installs nothing: it uses python3, or PYTHON=python3.12, and a copy of this tree in the layout of an
# installation. Where the tree is not a git repository, pass the commit: SRPKD_COMMIT=abc1234 bench/gpu_check.sh OUT.
set -uo pipefail

out=${1:?usage: bench/gpu_check.sh OUT [--only PART ...]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -r "$root"/{srpkd,kernels,csrc,bench,tests,docs,pyproject.toml,setup.py,README.md} "$stage"
ln -sfn ../kernels ../csrc "$stage/srpkd" # also where the tree was copied without its links
SRPKD_COMMIT=$(git -C "$root" describe --always --dirty=+ 2>/dev/null || echo "${SRPKD_COMMIT:-unknown}")
out=$(mkdir -p "$out" && cd "$out" && pwd) || exit 2
export SRPKD_COMMIT PYTHONPATH="$stage"
cd "$stage" || exit 2
"$python" -u -m bench.gpu_check "$out" "$@" 2>&1 | tee -a "$out/gpu_check.log"
