#!/usr/bin/env bash
# One prepared session on one H100 or H200: everything that only a GPU can tell, in the order of
# its worth. All of it took 13 minutes on an H200 with 16 cores; name parts to do with less.
#
#     bash benchmarks/gpu_day.sh OUTPUT_FOLDER [PART ..]     # on the GPU
#     bash benchmarks/gpu_day.sh OUTPUT_FOLDER --check       # any machine, toy sizes
#
# The machine needs Python 3.11 or newer and jax with CUDA. Of requirements.txt, what it lacks
# may lie as wheels in $WHEELS (default .whl), so that no network is needed. On a machine that
# has one, with the GPU machine's Python version and platform:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 \
#         --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .whl \
#         array-record grain importlib_resources ml_collections tensorflow-datasets dm-tree \
#         simple_parsing tensorflow-metadata toml immutabledict docstring-parser etils flax \
#         googleapis-common-protos orbax-checkpoint optax chex jaxtyping treescope \
#         tensorboardX termcolor portpicker filelock
#     pip wheel --no-deps -w .whl promise
#
# Every part is a process of its own, has a limit of time and writes JSON after each row.
set -uo pipefail
cd "$(dirname "$0")/.."

output=${1:?usage: gpu_day.sh OUTPUT_FOLDER [--check] [PART ..]}
shift
check=
if [ "${1:-}" = --check ]; then check=--check; shift; fi
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
if [ -z "$check" ] && ls "$wheels"/*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
mkdir -p "$output"
failed=0

run() {  # NAME SECONDS COMMAND..
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    echo "== $name (at most $seconds s)"
    timeout "$((seconds + 20))" "$@" || { echo "== $name: exit $?"; failed=1; }
    echo "== $name took $((SECONDS - began)) s"
}

part() {  # NAME SECONDS: a part of benchmarks.gpu_day
    run "$1" "$2" "$python" -m benchmarks.gpu_day "$1" --seconds="$2" --output="$output" $check
}

one() {  # NAME
    case $1 in
        checks) part checks 80 ;;
        quickstart) part quickstart 90 ;;
        step) part step 150 ;;
        base) part base 170 ;;
        lookups)
            if [ -n "$check" ]; then cases=toy; else cases=reference,down; fi
            run lookups 100 "$python" -m benchmarks.gpu --rounds=7 --cases="$cases" \
                --output="$output/lookups.json" $check ;;
        decode) part decode 90 ;;
        *) echo "gpu_day.sh: unknown part '$1'" >&2; exit 2 ;;
    esac
}

[ $# -gt 0 ] || set -- checks quickstart step base lookups decode
if [ "${1:-} ${2:-}" = "checks quickstart" ]; then  # they time nothing: side by side
    shift 2
    (one quickstart; exit "$failed") &
    one checks
    wait $! || failed=1
fi
for name in "$@"; do
    one "$name"
done
exit "$failed"
