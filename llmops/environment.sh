# shellcheck shell=bash
# Sourced by the project's commands: messages on stderr, and a Python that has the pinned packages.

log() { printf '%s\n' "$*" >&2; }
die() {
    log "error: $*"
    exit 2
}

# A command's settings are the variables of its "# --- settings" block, one per line: NAME="${NAME:-default}" # comment
# read_settings SCRIPT ARGUMENTS...: flags into these variables (--train_type is TRAIN_TYPE); --help; names in NAMES.
# DEMO, where the script has that variable, is a switch; REST, where it has that, takes what follows --.
read_settings() {
    local script=$1 name
    shift
    mapfile -t NAMES < <(sed -n '/^# --- settings/,/^# --- end/s/^\([A-Z_]*\)=.*/\1/p' "$script")
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help)
            print_usage "$script"
            exit 0
            ;;
        --demo)
            [ -n "${DEMO:-}" ] || die "unknown argument --demo; bash ${script##*/} --help lists every setting"
            DEMO=true
            shift
            continue
            ;;
        --)
            declare -p REST &>/dev/null || die "unknown argument --; bash ${script##*/} --help lists every setting"
            REST=("${@:2}")
            break
            ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        name=${1#--}
        name=${name^^}
        [[ $1 == --* && " ${NAMES[*]} " == *" $name "* ]] || die "unknown argument $1; bash ${script##*/} --help lists every setting"
        [ $# -ge 2 ] || die "$1 needs a value; bash ${script##*/} --help lists every setting"
        printf -v "$name" '%s' "$2"
        shift 2
    done
}

# setting_flags NAME...: the settings that have a value as flags, without the named ones, each ended by a NUL
setting_flags() {
    local name
    for name in "${NAMES[@]}"; do
        [[ " $* " == *" $name "* ]] || [ -z "${!name}" ] || printf '%s\0' "--${name,,}" "${!name}"
    done
}

# print_usage SCRIPT: the comment at its top, then its settings with their flags and defaults
print_usage() {
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$1"
    printf '%s\n\n' "Settings (flag, description, default):"
    sed -n '/^# --- settings/,/^# --- end/p' "$1" | awk '
        /^# --- settings/ { gsub(/^# --- settings(: )?| ?-+$/, ""); if ($0 != "") printf "%s\n", $0; next }
        /^[A-Z_]+=/ {
            name = $0; sub(/=.*/, "", name); text = $0; sub(/^[^#]*# */, "", text)
            value = $0; sub(/^[^:]*:-/, "", value); sub(/\}".*/, "", value)
            printf "  --%-29s %s%s\n", tolower(name), text, value == "" ? "" : " [" value "]"
        }'
    printf '\n%s\n' "In the environment the variable of --train_type is TRAIN_TYPE, and so on."
}

# forward COMMAND...: run it as a child, pass SIGTERM and SIGINT on, wait for its good end; its exit status
forward() {
    local child status=0
    "$@" &
    child=$!
    # shellcheck disable=SC2064 # this child, also when the trap runs
    trap "kill -TERM $child" TERM INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal interrupts wait
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT
    return "$status"
}

# demo_folder MOUNT_PATH ROOT: where the embedded example works: beside the user's own data, never over it
demo_folder() {
    if [ "$1" = "$2/mnt" ] && [ ! -d "$1" ]; then printf '%s\n' "$2/mnt_demo"; else printf '%s\n' "$1/demo"; fi
}

# has_gpu: whether an NVIDIA device is there; CUDA_VISIBLE_DEVICES=-1 asks for the CPU
has_gpu() { [ "${CUDA_VISIBLE_DEVICES:-}" != -1 ] && { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }; }

# tune_cpu: for work without a GPU; what the environment has already stays
tune_cpu() {
    export DS_ACCELERATOR=cpu
    # glibc gives large blocks back to the kernel at once and gets them zeroed again; keeping them is about 20% faster
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
    # threads that wait spin for some microseconds, then sleep: by default they spin for milliseconds, and jobs that want
    # the same cores stall each other by a factor of ten and more; without spinning small operations take twice as long
    [ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
    export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
}

# offline_libraries: nothing is fetched unless the environment says so
offline_libraries() { export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"; }

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
