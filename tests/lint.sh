#!/usr/bin/env bash
# Check Python, shell scripts and the Dockerfile; every tool runs, the exit code tells whether all were content.
#   lint.sh [FOLDER]    FOLDER holds ruff, mypy, shellcheck, shfmt and hadolint (default: .venv/bin)
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
tools=$(realpath -m -- "${1:-$root/.venv/bin}")
cd -- "$root"

for tool in ruff mypy shellcheck shfmt hadolint; do
    if [ ! -x "$tools/$tool" ]; then
        printf 'error: %s is not in %s; install requirements-dev.txt there or name another folder\n' "$tool" "$tools" >&2
        exit 2
    fi
done
mapfile -t scripts < <(git ls-files -- '*.sh' .ci/run)
if [ "${#scripts[@]}" -eq 0 ]; then
    printf 'error: git lists no shell script here; run this in a git checkout of the project\n' >&2
    exit 2
fi

status=0
check() {
    printf '+ %s\n' "$*" >&2
    "$tools/$1" "${@:2}" || status=1
}
check ruff check --quiet .
check mypy --no-error-summary
check shellcheck --external-sources "${scripts[@]}"
check shfmt -i 4 -d "${scripts[@]}"
check hadolint Dockerfile
exit "$status"
