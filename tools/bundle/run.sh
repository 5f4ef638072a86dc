#!/usr/bin/env bash
# On a machine with an NVIDIA card, without Rust: tests on the card, the bench, compute-sanitizer where it is installed.
#
#     ./run.sh [OUT]         leaves report.json, bench.json, the times of a step's kernels in bench.kernels.tsv, those of every kernel
#                            that could compute one of its products in products.txt, and what else was said as text in OUT
#                            [default: report beside this]
#
# REQUIRE_GPU=1 makes a machine without a card a failure. PEER_PYTHON [default: python3] is a Python with torch, diffusers and
# transformers; without them the bench has no peers. BENCH_FLAGS are flags of `cargo xtask bench`. `cargo xtask bundle --gpu`
# made this folder.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/report}

if [ ! -e /dev/nvidia0 ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo 'skipped, no device'
    [ "${REQUIRE_GPU:-0}" != 1 ] || { echo 'REQUIRE_GPU=1 asks for one' >&2; exit 1; }
    exit 0
fi

mkdir -p "$out"
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
tar -xJf "$here/programs.tar.xz" -C "$programs" || exit 1
# Programs find what they read as in the repository: from a package's folder, beside which the others are.
export CARGO_MANIFEST_DIR=$here/tools HIPER_TEST_DEVICE=cuda:0
PEER_PYTHON=${PEER_PYTHON:-$(command -v python3)}
"${PEER_PYTHON:-false}" -c 'import torch' 2>/dev/null || PEER_PYTHON=
export PEER_PYTHON
# For the peers and for compute-sanitizer: hiper itself needs the driver alone.
for packages in $("${PEER_PYTHON:-false}" -c 'import site; print(*site.getsitepackages())' 2>/dev/null); do
    libraries=$packages/nvidia/cu13/lib:${libraries:-}
done
export LD_LIBRARY_PATH=${libraries:-}/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)

failed=0 results=''
# NAME COMMAND…: runs it, keeps what it says in OUT/NAME.txt, and notes how it ended.
check() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed=1
    results+="${results:+, }\"$name\": {\"exit_code\": $status, \"seconds\": $((SECONDS - started))}"
    # After each, since a runner may stop this.
    printf '{"card": "%s", "compute-sanitizer": "%s", "checks": {%s}}\n' "$card" "$sanitizer" "$results" >"$out/report.json"
}

card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader --id=0 2>/dev/null)
check operators "$programs/operators" card
check operators_without_sm90a env HIPER_SM90A=0 "$programs/operators" card
check network "$programs/network" --nocapture
[ -z "$PEER_PYTHON" ] || check operator_errors "$PEER_PYTHON" "$here/tools/fixtures/operators.py" --device cuda
check steps "$programs/steps" network
# shellcheck disable=SC2086
check bench "$programs/xtask" bench --gpu --hiper "$programs/hiper" --out "$out/bench.json" --rounds 2 ${BENCH_FLAGS:-}
check products env HIPER_TEST_UNET_SIZES=1 "$programs/operators" by_all_plans --nocapture
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        check "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 "$programs/operators" card --test-threads 1
    done
else
    echo 'compute-sanitizer is not installed: memcheck and racecheck are left out'
fi
exit "$failed"
