#!/usr/bin/env bash
# Build, test, sanitize and measure on a machine with a GPU. Writes CSV and PNG files and a log to OUT.
#
#   bench/gpu_check.sh OUT                 all parts
#   bench/gpu_check.sh OUT --only bench    one part: tests, sanitize, bench or train; each takes less than nine minutes
#
# With the same OUT, `bench` resumes with the missing cases. The script needs no network and installs nothing: it uses
# python3 (or PYTHON=python3.12) and a copy of this tree in the layout of an installation. If a part fails, the others
# still run; the summary at the end lists the failures, and the exit status is 1. Without a GPU it is a dry run on the
# CPU.
set -uo pipefail

usage="usage: bench/gpu_check.sh OUT [--only tests|sanitize|bench|train]"
out=${1:?$usage}
case "${2:-} ${3:-}" in
    " ") parts="tests sanitize bench train" ;;
    "--only tests" | "--only sanitize" | "--only bench" | "--only train") parts=$3 ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
exec > >(tee -a "$out/gpu_check.log") 2>&1

# a copy without binaries that were built for another torch; its links are restored where the tree has none
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -r "$root"/{srpkd,kernels,csrc,bench,tests,docs,pyproject.toml,setup.py,README.md} "$stage"
ln -sfn ../kernels ../csrc "$stage/srpkd"
find "$stage" -name '*.so' -delete
cd "$stage" || exit 2
SRPKD_COMMIT=$(git -C "$root" describe --always --dirty=+ 2>/dev/null || echo "${SRPKD_COMMIT:-unknown}")
export SRPKD_COMMIT PYTHONPATH="$stage" PYTHONUNBUFFERED=1

PART_SECONDS=525
failed=()
limit() { # limit SECONDS NAME COMMAND...: run a command until its limit or the end of the part, and record failures
    local seconds=$1 name=$2 status
    shift 2
    [ "$seconds" -gt $((ends - SECONDS)) ] && seconds=$((ends - SECONDS))
    if [ "$seconds" -le 0 ]; then
        echo "--- $name: no time left"
        failed+=("$name (no time)")
        return 1
    fi
    echo "--- $name: $*"
    timeout -k 10 "$seconds" "$@"
    status=$?
    [ $status -eq 124 ] && echo "$name: stopped after $seconds s"
    [ $status -ne 0 ] && failed+=("$name (status $status)")
    return $status
}

tests() { # in parallel, because most of the time goes into compiling kernels
    limit 510 tests "$python" -m pytest -m gpu tests -q -p no:cacheprovider --continue-on-collection-errors \
        -n auto --maxprocesses 8 --dist worksteal
}

sanitize() {
    if [ "$gpu" = no ]; then
        limit 120 "sanitize, dry run" "$python" -m bench.sanitize native
    elif ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed: skipped"
    elif ! timeout 60 compute-sanitizer --error-exitcode 9 "$python" -c "import torch; torch.ones(1, device='cuda')"; then
        echo "compute-sanitizer does not work here: skipped"
    else
        # first without compute-sanitizer, to compile the kernels
        limit 200 "sanitize, compile" "$python" -m bench.sanitize
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 limit 150 "$tool" \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.sanitize
        done
    fi
}

bench() {
    local choice=(--sweep full --minutes $(((ends - SECONDS - 60 - 210) / 60)))
    [ "$gpu" = no ] && choice=(--sweep quick --minutes 2 --budget 1)
    limit 60 "peak rates" "$python" -m bench.machine
    limit $((ends - SECONDS - 130)) relation "$python" -m bench relation "${choice[@]}" --missing --out "$out/relation.csv"
    limit 30 plot "$python" -m bench plot --csv "$out/relation.csv"
    limit 30 scaling "$python" -m bench scaling --csv "$out/relation.csv"
    [ -e "$out/accuracy.csv" ] || limit 90 accuracy "$python" -m bench accuracy --out "$out/accuracy.csv"
}

train() {
    local choice=()
    [ "$gpu" = no ] && choice=(--size 64 --netG resnet_1blocks --budget 2)
    limit 420 train "$python" -m bench train "${choice[@]}" --out "$out/train.csv"
    limit 90 profile "$python" -m bench train "${choice[@]}" --profile
}

ends=$((SECONDS + PART_SECONDS))
gpu=no
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && gpu=yes
[ "$gpu" = no ] && echo "torch sees no CUDA device: dry run on the CPU, GPU tests are deselected"
echo "$(date -u +%FT%TZ) $SRPKD_COMMIT: $parts"
build="from srpkd.kernels import native; native.extension(); print(native.status())"
limit 400 build "$python" -c "$build" || echo "continue without the native backend"
"$python" -m srpkd.info

for part in $parts; do
    "$part"
    echo "=== $part: $((PART_SECONDS + SECONDS - ends)) s"
    ends=$((SECONDS + PART_SECONDS)) # the time of the first part includes the build
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "success; the results are in $out"
