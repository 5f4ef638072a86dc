#!/usr/bin/env bash
# On a machine with an NVIDIA card, without Rust: tests on the card, the bench, compute-sanitizer where it is installed.
#
#     ./run.sh [OUT [CHECK…]]   runs the checks, or those named, and leaves report.json, bench.json, the times of a step's kernels in
#                               bench.kernels.tsv, and what else was said as text in OUT [default: report beside this]. Checks of
#                               earlier calls stay in report.json, so that all can be run one by one
#
# CHECK, in this order: operators operators_without_sm90a network operator_errors operator_ratios steps bench products memcheck
# memcheck_network memcheck_steps racecheck_without_sm90a racecheck.
# REQUIRE_GPU=1 makes a machine without a card, and whatever is left out, a failure. LIMIT is how many seconds a check may take, but
# for the bench [default: 600]. PEER_PYTHON [default: python3] is a Python with torch, diffusers and transformers; without them the
# bench has no peers. BENCH_FLAGS are flags of `cargo xtask bench` [default: --rounds 2]. `cargo xtask bundle --gpu` made this folder.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/report}
all=(operators operators_without_sm90a network operator_errors operator_ratios steps bench products
    memcheck memcheck_network memcheck_steps racecheck_without_sm90a racecheck)
checks=("${@:2}")
[ ${#checks[@]} != 0 ] || checks=("${all[@]}")
for name in "${checks[@]}"; do
    [[ " ${all[*]} " == *" $name "* ]] || { echo "$name is none of the checks: ${all[*]}" >&2; exit 2; }
done

# Where containers have the driver.
nvidia=/usr/local/nvidia
[ ! -d $nvidia/bin ] || PATH=$PATH:$nvidia/bin
if [ ! -e /dev/nvidia0 ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo 'skipped, no device'
    [ "${REQUIRE_GPU:-0}" != 1 ] || { echo 'REQUIRE_GPU=1 asks for one' >&2; exit 1; }
    exit 0
fi

if ! mkdir -p "$out/checks" || ! touch "$out/report.json"; then
    echo "$out cannot be written" >&2
    exit 1
fi
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
tar -xJf "$here/programs.tar.xz" -C "$programs" || python3 -m tarfile -e "$here/programs.tar.xz" "$programs" ||
    { echo 'programs are unpacked with tar and xz, or with python3' >&2; exit 1; }
# Programs find what they read as in the repository: from a package's folder, beside which the others are.
export CARGO_MANIFEST_DIR=$here/tools HIPER_TEST_DEVICE=cuda:0
python=${PEER_PYTHON:-$(command -v python3 || echo python3)}
missing=''
for package in torch diffusers transformers; do
    said=$("$python" -c "import $package" 2>&1) || missing+="$package: ${said##*$'\n'}"$'\n'
done
export PEER_PYTHON=$python
[[ $missing != torch:* ]] || PEER_PYTHON=
# For the peers and for compute-sanitizer: hiper itself needs the driver alone.
for packages in $("${PEER_PYTHON:-false}" -c 'import site; print(*site.getsitepackages())' 2>/dev/null); do
    libraries=$packages/nvidia/cu13/lib:${libraries:-}
done
export LD_LIBRARY_PATH=${libraries:-}/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
finds_driver() {
    PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep 'libcuda\.so\.1' >/dev/null && return
    local folders
    IFS=: read -ra folders <<<"$LD_LIBRARY_PATH"
    for folder in "${folders[@]}"; do [ ! -e "$folder/libcuda.so.1" ] || return 0; done
    return 1
}
[ ! -d $nvidia/lib64 ] || finds_driver || LD_LIBRARY_PATH+=:$nvidia/lib64

# Programs number cards as nvidia-smi does, and take the first that they see.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
visible=${CUDA_VISIBLE_DEVICES:-0}
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader --id="${visible%%,*}" 2>/dev/null)
# What the driver makes of candle's kernels takes it some seconds, each time if nobody keeps it.
[ -n "${CUDA_CACHE_PATH:-}" ] || [ -w "${HOME:-/nowhere}" ] || export CUDA_CACHE_PATH=$programs/cache
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
sanitizer_version=$([ -z "$sanitizer" ] || "$sanitizer" --version | sed -n 's/^Version //p')
# NVIDIA's release notes: until then racecheck finds races where mbarriers, clusters or warpgroups keep threads apart.
false_findings=''
if [ "$(printf '%s\n' "$sanitizer_version" 2026.3 | sort -V | head -n 1)" != 2026.3 ]; then
    false_findings="no failure: compute-sanitizer $sanitizer_version, older than 2026.3, is known to misjudge mbarriers, clusters and warpgroups"
fi

# NAME FIELDS: how a check ended, beside those of earlier calls.
note() {
    printf '{%s, "card": "%s"}\n' "$2" "$card" >"$out/checks/$1.json"
    local results='' name
    for name in "${all[@]}"; do
        [ ! -e "$out/checks/$name.json" ] || results+="${results:+, }\"$name\": $(cat "$out/checks/$name.json")"
    done
    local ratios='' source=null
    [[ $(cat "$out/operator_ratios.txt" 2>/dev/null) != '{'*'}}' ]] || ratios=", \"operator_errors\": $(cat "$out/operator_ratios.txt")"
    [ ! -e "$here/source.json" ] || source=$(cat "$here/source.json")
    printf '{"source": %s, "compute-sanitizer": "%s", "checks": {%s}%s}\n' \
        "$source" "$sanitizer $sanitizer_version" "$results" "$ratios" >"$out/report.json"
}

failed=0
# NAME COMMAND…: runs it, keeps what it says in OUT/NAME.txt, and notes how it ended. $findings says why what a sanitizer finds in
# Hopper's kernels is no failure.
check() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    # A runner may stop this; what hangs stops here, so that the others have their turn.
    note "$name" '"exit_code": null'
    local within=(timeout --foreground -k 10 "${LIMIT:-600}")
    [ "$name" != bench ] && [ "$(type -t "$1")" != function ] || within=()
    "${within[@]}" "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]} remark=''
    if [ "$status" = $found ] && [ -n "${findings:-}" ] && ! grep 'Race reported' "$out/$name.txt" | grep -v sm90a >/dev/null; then
        remark=", \"note\": \"$findings\""
        echo "$findings"
    elif [ "$status" != 0 ]; then
        failed=1
        echo "== $name failed: $status"
    fi
    note "$name" "\"exit_code\": $status, \"seconds\": $((SECONDS - started))$remark"
}

# NAME WHY
leave_out() {
    echo "== $1 is left out: $2"
    [ "${REQUIRE_GPU:-0}" != 1 ] || failed=1
    note "$1" "\"left_out\": \"$2\""
}

# What operators of ours err in f16 beside PyTorch's on this card, from what both printed: JSON.
# shellcheck disable=SC2329 # It is a check.
ratios() {
    awk -v limit=2 '
        match($0, /[0-9.]+e[-+]?[0-9]+  PyTorch [0-9.]+e[-+]?[0-9]+  /) {
            split(substr($0, RSTART, RLENGTH), words, " "); ours[substr($0, RSTART + RLENGTH)] = words[1]; next
        }
        match($0, /^[0-9.]+e[-+]?[0-9]+  /) { theirs[substr($0, RLENGTH + 1)] = $1 }
        END {
            printf "{\"limit\": %s, \"errors\": {", limit
            # What ours did not say, as a number, is too much.
            for (what in theirs) {
                if (!(what in ours)) ours[what] = ratio = "null"
                else ratio = theirs[what] > 0 ? sprintf("%.3f", ours[what] / theirs[what]) : ours[what] > 0 ? "null" : 0
                over += ratio == "null" || ratio + 0 > limit
                printf "%s\n\"%s\": {\"ours\": %s, \"pytorch\": %s, \"ratio\": %s}", n++ ? "," : "", what, ours[what], theirs[what], ratio
            }
            print "}}"
            exit !n || over
        }' "$out/network.txt" "$out/operator_errors.txt"
}

# What compute-sanitizer ends with where it finds something.
found=9
# NAME TOOL COMMAND…
sanitize() {
    [ -n "$sanitizer" ] || { leave_out "$1" 'compute-sanitizer is not installed'; return; }
    check "$1" "$sanitizer" --tool "$2" "${@:3}" --test-threads 1
}
# NAME COMMAND… What asks the driver whether it can do something is told no, which is no finding.
memcheck() { sanitize "$1" memcheck --report-api-errors no --error-exitcode $found "${@:2}"; }
racecheck() { sanitize "$1" racecheck --error-exitcode $found "${@:2}"; }

tell_missing() {
    [ -z "$missing" ] || printf '\n*** PyTorch is not measured: %s lacks\n%s\n' "$python" "$missing"
}

tell_missing
for name in "${checks[@]}"; do
    case $name in
        operators) check operators "$programs/operators" card ;;
        operators_without_sm90a) check operators_without_sm90a env HIPER_SM90A=0 "$programs/operators" card ;;
        network) check network "$programs/network" --nocapture ;;
        operator_errors)
            if [ -n "$PEER_PYTHON" ]; then
                check operator_errors "$PEER_PYTHON" "$here/tools/fixtures/operators.py" --device cuda
            else
                leave_out operator_errors 'torch is not installed'
            fi
            ;;
        operator_ratios)
            if [ -s "$out/network.txt" ] && [ -s "$out/operator_errors.txt" ]; then
                check operator_ratios ratios
            else
                leave_out operator_ratios 'it needs network and operator_errors before it'
            fi
            ;;
        steps) check steps "$programs/steps" network ;;
        bench)
            # shellcheck disable=SC2086
            check bench "$programs/xtask" bench --gpu --hiper "$programs/hiper" --out "$out/bench.json" ${BENCH_FLAGS:---rounds 2}
            ;;
        products) check products env HIPER_TEST_UNET_SIZES=1 "$programs/operators" by_all_plans --nocapture ;;
        memcheck) memcheck memcheck "$programs/operators" card ;;
        memcheck_network) memcheck memcheck_network "$programs/network" a_recorded ;;
        memcheck_steps) memcheck memcheck_steps "$programs/steps" a_cards_steps ;;
        racecheck_without_sm90a)
            HIPER_SM90A=0 racecheck racecheck_without_sm90a "$programs/operators" card
            ;;
        racecheck) findings=$false_findings racecheck racecheck "$programs/operators" card ;;
    esac
done

tell_missing
# Last, where it is seen: the bench's table.
[[ " ${checks[*]} " != *' bench '* ]] || grep '^|' "$out/bench.txt"
exit "$failed"
