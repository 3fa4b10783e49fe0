# shellcheck shell=bash
# Sourced by the project's commands: messages on stderr, and a Python that has the pinned packages.

log() { printf '%s\n' "$*" >&2; }
die() {
    log "error: $*"
    exit 2
}

# project_python: any Python 3.11 or newer, preferring the one that will run the work; enough for --help and checks
project_python() {
    local root=$1 candidate
    for candidate in "$root/.venv/bin/python" python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed; install python3.11 with its venv module and start again"
}

# has_packages PYTHON REQUIREMENTS: whether this Python has the pinned versions
has_packages() {
    "$1" - "$2" 2>/dev/null <<'PYTHON'
import pathlib, sys
from importlib.metadata import PackageNotFoundError, version
def satisfied(path):
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r"):
            if not satisfied(path.with_name(line[2:].strip())):
                return False
        elif line:
            name, _, wanted = line.partition("==")
            try:
                if version(name).split("+")[0] != wanted:
                    return False
            except PackageNotFoundError:
                return False
    return True
sys.exit(not satisfied(pathlib.Path(sys.argv[1])))
PYTHON
}

# ensure_python ROOT REQUIREMENTS: prints a Python that has the packages; makes ROOT/.venv when there is none
ensure_python() {
    local root=$1 requirements=$2 candidate
    for candidate in python3 "$root/.venv/bin/python"; do
        if command -v "$candidate" >/dev/null && has_packages "$candidate" "$requirements"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    log "installing the packages of ${requirements##*/} into $root/.venv (once; a few minutes)"
    candidate=$(project_python "$root") || exit 2
    [ -x "$root/.venv/bin/python" ] || "$candidate" -m venv "$root/.venv" >&2 ||
        die "the virtual environment cannot be made; install the venv module of $candidate (Debian: python3-venv)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2 ||
        die "the packages of $requirements cannot be installed; see pip's message above"
    printf '%s\n' "$root/.venv/bin/python"
}
