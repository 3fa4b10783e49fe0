# shellcheck shell=bash
# Sourced by the project's commands: messages on stderr, and a Python that has the pinned packages.
#
# A script that a Windows editor saved would end in "pipefail: invalid option name". Each line here, and the one that sources
# this file, ends in a comment, which takes the carriage return.
WINDOWS=$(grep -ls $'\r' "${BASH_SOURCE[@]}") || true # the scripts that are so
#
[ -z "$WINDOWS" ] || printf "error: Windows line endings; mend them: sed -i 's/\\\\r\$//' %s\n" "${WINDOWS//$'\n'/ }" >&2 #
#
[ -z "$WINDOWS" ] || exit 2 #

unset CDPATH # where it is exported, cd prints where it went, and "cd faq/.." may go elsewhere

# log WORDS...: a line for people on stderr
log() { printf '%s\n' "$(spoken "$*")" >&2; }

# spoken WORDS...: a line in the language of the people here; in English where there is no Python to ask
spoken() {
    local wanted="${LLMOPS_LANG:-} ${LANGUAGE:-} ${LC_ALL:-} ${LC_MESSAGES:-} ${LANG:-}"
    [[ $wanted == *[zZ][hH]* ]] &&
        python3 -I -S "$(dirname -- "${BASH_SOURCE[0]}")/translation.py" "$*" 2>/dev/null || printf '%s' "$*"
}

die() {
    log "error: $*"
    exit 2
}

# command_not_found_handle WORD...: bash takes a setting with blanks around = for a command
command_not_found_handle() {
    [[ ${2:-} != =* ]] || die "${0##*/} has '$1 $2 ...': a setting is written without blanks around =, as $1=\"...\""
    log "${0##*/}: $1: command not found"
    return 127
}

# lower TEXT, upper TEXT: REPLY is TEXT in small, in capital letters of English: in Turkish the small one of I is ı
lower() {
    local LC_ALL=C
    REPLY=${1,,}
}
upper() {
    local LC_ALL=C
    REPLY=${1^^}
}

# A command's settings are the variables of its "# --- settings" block, one per line: NAME="${NAME:-default}" # comment
# read_settings SCRIPT ARGUMENTS...: flags into these variables (--train_type is TRAIN_TYPE); --help; names in NAMES.
# DEMO, where the script has that variable, is a switch; REST, where it has that, takes what follows --.
read_settings() {
    local script=$1 name
    shift
    show_environment "$script"
    mapfile -t NAMES < <(LC_ALL=C sed -n '/^# --- settings/,/^# --- end/s/^\([A-Z][A-Z0-9_]*\)=.*/\1/p' "$script")
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
        upper "${1#--}"
        name=$REPLY
        if [[ $1 != --* ]] || ! one_of "$name" "${NAMES[@]}"; then
            check_marks "$1"
            die "unknown argument $1; bash ${script##*/} --help lists every setting"
        fi
        [ $# -ge 2 ] || die "$1 needs a value; bash ${script##*/} --help lists every setting"
        printf -v "$name" '%s' "$2"
        shift 2
    done
    check_settings
}

# check_marks ARGUMENT: ends with a sentence where a flag has dashes or an equals sign of another keyboard
check_marks() {
    local dashes=($'\xe2\x80\x93' $'\xe2\x80\x94' $'\xef\xbc\x8d' $'\xe2\x88\x92') equals=$'\xef\xbc\x9d'
    local flag=${1%%=*} mark name place rest
    flag=${flag%%"$equals"*}
    rest=${1#"$flag"}
    name=$flag
    for mark in "${dashes[@]}" -; do name=${name//"$mark"/}; done
    upper "$name"
    one_of "$REPLY" "${NAMES[@]}" || return 0
    for mark in "${dashes[@]}" "$equals"; do
        place=${1%%"$mark"*}
        [ "${#place}" -le "${#flag}" ] || continue
        [ "$place" != "$1" ] || continue
        place=$((${#place} + 1))
        rest=--$name${rest/#"$equals"/=}
        die "found $mark as character $place of $1; write $rest"
    done
}

# show_environment SCRIPT: a line edited to NAME="value" instead of NAME="${NAME:-value}" has hidden the variable that the
# command was started with; the environment wins over the edited line all the same
show_environment() {
    local name variable
    while read -r name; do
        while IFS= read -r -d '' variable; do
            [[ $variable != "$name="?* ]] || printf -v "$name" '%s' "${variable#*=}"
        done <"/proc/$$/environ"
    done < <(LC_ALL=C sed -n '/^# --- settings/,/^# --- end/{/:-/!s/^\([A-Z][A-Z0-9_]*\)=.*/\1/p;}' "$1")
}

# one_of WORD WORDS...: whether the first is among the others
one_of() {
    local word=$1 other
    shift
    for other; do [ "$word" != "$other" ] || return 0; done
    return 1
}

# The settings of all commands that are true or false; a command's own list is what it has of these.
BOOLEANS=(ALLOW_SPECIAL_TOKENS AUTH BASE_TOO CHAT_TEMPLATE COMPARE CONSOLE CONSTRAIN DRY_RUN EXPLAIN EXPORT_OFFICIAL
    LOAD_BEST_MODEL_AT_END MERGE_LORA NO_SSH OVERWRITE OVERWRITE_OUTPUT_PATH PACKING RESUME REUSE_PREFIX SKIP_BAD_LINES
    TENSORBOARD TRUST_REMOTE_CODE UNTUNED USE_THRESHOLD WATCH)

# check_settings: what this shell itself acts on, however it was set; the rest is checked by the Python program it is for.
# After it a boolean is true or false, with the words that llmops/console.py takes.
check_settings() {
    local name
    for name in "${NAMES[@]}"; do
        case $name in
        NUM_PROCESSES) check_number NUM_PROCESSES 1 1024 ;;
        NODE_RANK) check_number NODE_RANK 0 65535 ;;
        MASTER_PORT) check_number MASTER_PORT 1 65535 ;;
        CUDA_VISIBLE_DEVICES) check_devices ;;
        *) ! one_of "$name" "${BOOLEANS[@]}" || check_boolean "$name" ;;
        esac
    done
}

# shown_setting NAME: the flag and the value, for an error
shown_setting() {
    lower "$1"
    printf -- "--%s is '%s'" "$REPLY" "${!1}"
}

# trimmed TEXT: without blanks at both ends
trimmed() {
    local text=$1
    text=${text#"${text%%[![:space:]]*}"}
    printf '%s' "${text%"${text##*[![:space:]]}"}"
}

# check_boolean NAME: true, yes and 1 become true, false, no and 0 become false, in any case; an empty one is the default
check_boolean() {
    local value
    value=$(trimmed "${!1}")
    lower "$value"
    case $REPLY in
    true | yes | 1) printf -v "$1" true ;;
    false | no | 0) printf -v "$1" false ;;
    "") printf -v "$1" '' ;;
    *) die "$(shown_setting "$1"), expected true or false" ;;
    esac
}

# check_number NAME LOWEST HIGHEST: a whole number in these bounds, or empty
check_number() {
    local value
    value=$(trimmed "${!1}")
    if [ -n "$value" ]; then
        if [[ ! $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2 || 10#$value > $3)); then
            die "$(shown_setting "$1"), expected a whole number from $2 to $3"
        fi
        value=$((10#$value))
    fi
    printf -v "$1" '%s' "$value"
}

# is_device NAME: whether it is a GPU's number or UUID
is_device() {
    local LC_ALL=C # elsewhere A-Z leaves letters out, or takes others in
    [[ $1 =~ ^([0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z/-]+)$ ]]
}

# check_devices: CUDA_VISIBLE_DEVICES is empty, -1 (none), or GPUs by number or by UUID, each once
check_devices() {
    local device wide seen=() value=${CUDA_VISIBLE_DEVICES//[[:space:]]/}
    CUDA_VISIBLE_DEVICES=$value
    if [ -z "$value" ] || [ "$value" = -1 ]; then return; fi
    while IFS= read -r -d , device; do
        if ! is_device "$device"; then
            wide=${value%%，*}
            wide=$((${#wide} + 1))
            case $value in
            *，*) wide="; write , and not the full-width ， (character $wide of $value)" ;;
            *) wide="" ;;
            esac
            die "$(shown_setting CUDA_VISIBLE_DEVICES), expected GPUs such as 0,1 (numbers from 0 or UUIDs), or -1 for none$wide"
        fi
        ! one_of "$device" ${seen[@]+"${seen[@]}"} || die "$(shown_setting CUDA_VISIBLE_DEVICES), which names $device twice"
        seen+=("$device")
    done <<<"$value,"
}

# setting_flags NAME...: the settings that have a value as flags, without the named ones, each ended by a NUL. A value that
# begins with a dash (-1e-5) is joined to its flag, or Python's argparse would take it for a flag.
setting_flags() {
    local name
    for name in "${NAMES[@]}"; do
        lower "$name"
        if [[ " $* " == *" $name "* || -z ${!name} ]]; then
            continue
        elif [[ ${!name} == -* ]]; then
            printf '%s\0' "--$REPLY=${!name}"
        else
            printf '%s\0' "--$REPLY" "${!name}"
        fi
    done
}

# hand_to_platform TASK ARGUMENTS...: the platform that these commands come from starts eval/*.sh itself and wants to be
# told of the end: it sets where (API_URL), as whom (AUTH) and for whom (TENANT_ID). job/run.sh then takes over; the command
# that it starts in turn sees none of the three.
hand_to_platform() {
    if [ -z "${API_URL:-}" ] || [ -z "${AUTH+set}" ] || [ -z "${TENANT_ID+set}" ]; then return; fi
    local root task=$1
    shift
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
    if [ $# -gt 0 ]; then set -- -- "$@"; fi
    exec bash "$root/job/run.sh" --task "$task" "$@"
}

# print_usage SCRIPT: the comment at its top, then its settings with their flags and defaults
print_usage() {
    sed -n '2,/^[^#]/{/^# shellcheck /!s/^# \{0,1\}//p;}' "$1"
    spoken "Settings (flag, description, default):"
    printf '\n\n'
    sed -n '/^# --- settings/,/^# --- end/p' "$1" | LC_ALL=C awk '
        /^# --- settings/ { gsub(/^# --- settings(: )?| ?-+$/, ""); if ($0 != "") printf "%s\n", $0; next }
        /^[A-Z][A-Z0-9_]*=/ {
            name = $0; sub(/=.*/, "", name); text = $0; sub(/^[^#]*# */, "", text)
            value = $0; if (!sub(/^[^:]*:-/, "", value)) sub(/^[^=]*="?/, "", value); sub(/(\}"|"| #).*/, "", value)
            printf "  --%-29s %s%s\n", tolower(name), text, value == "" ? "" : " [" value "]"
        }'
    printf '\n'
    spoken "In the environment the variable of --train_type is TRAIN_TYPE, and so on."
    printf '\n'
}

# forward COMMAND...: run it as a child, pass SIGTERM, SIGINT and SIGHUP on, wait for its good end; its exit status
forward() {
    local child="" asked=false status=0
    trap 'asked=true; [ -z "$child" ] || kill -TERM "$child"' TERM INT HUP # what nohup ignores stays ignored
    "$@" &
    child=$!
    [ "$asked" = false ] || kill -TERM "$child" || true # a signal that came before it
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal interrupts wait
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT HUP
    return "$status"
}

# demo_folder MOUNT_PATH ROOT: where the embedded example works: beside the user's own data, never over it
demo_folder() {
    if [ "$1" = "$2/mnt" ] && [ ! -d "$1" ]; then printf '%s\n' "$2/mnt_demo"; else printf '%s\n' "$1/demo"; fi
}

# forget_settings SCRIPT...: the embedded examples are the same for everybody: the settings of these commands that the
# environment holds are the user's, for runs of their own. Kept are those of the machine.
forget_settings() {
    local name
    while read -r name; do
        case $name in
        CUDA_VISIBLE_DEVICES | CPU_KERNELS | TENSORBOARD* | CONSOLE*) ;;
        *) unset "$name" ;;
        esac
    done < <(LC_ALL=C sed -n '/^# --- settings/,/^# --- end/s/^\([A-Z][A-Z0-9_]*\)=.*/\1/p' "$@")
}

# has_gpu: whether an NVIDIA device is there and CUDA_VISIBLE_DEVICES does not say none
has_gpu() { [ "${CUDA_VISIBLE_DEVICES:-}" != -1 ] && { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }; }

# tune_cpu: for work without a GPU; what the environment has already stays
tune_cpu() {
    export DS_ACCELERATOR=cpu
    # glibc gives large blocks back to the kernel at once and gets them zeroed again; keeping them is about 20% faster
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
    # threads that wait spin for some microseconds, then sleep: by default they spin for milliseconds, and jobs that want
    # the same cores stall each other by a factor of ten and more; without spinning small operations take twice as long.
    # Where several threads of a process compute in turn, as in a server, they hardly spin at all unless "active" is said.
    [ -n "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}" ] || export OMP_WAIT_POLICY=active GOMP_SPINCOUNT=1000
    export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
    # pages of 2 MB where the kernel gives them on request, which is the usual setting: 500 times fewer faults
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}

# The settings of a run's processes and machines, as llmops/launcher/launch.py takes them.
LAUNCHER_SETTINGS=(NUM_PROCESSES HOSTFILE INCLUDE_HOSTS EXCLUDE_HOSTS MASTER_ADDR MASTER_PORT NO_SSH NODE_RANK)

# launcher_flags: LAUNCH becomes the flags of launch.py for these settings
launcher_flags() {
    local name
    LAUNCH=()
    for name in "${LAUNCHER_SETTINGS[@]}"; do
        if [ "$name" = NO_SSH ]; then
            [ "$NO_SSH" != true ] || LAUNCH+=(--no_ssh)
        elif [ -n "${!name}" ]; then
            lower "$name"
            LAUNCH+=("--$REPLY=${!name}")
        fi
    done
    if [ "${CUDA_VISIBLE_DEVICES:-}" = -1 ] || [ "${GPU_ID:-}" = -1 ]; then LAUNCH+=(--on_cpu); fi
}

# check_launch PYTHON: machines and processes, before anything is installed or loaded
check_launch() {
    launcher_flags
    "$1" "$(dirname -- "${BASH_SOURCE[0]}")/launcher/launch.py" --check "${LAUNCH[@]}" || exit $?
}

# start_processes PYTHON SCRIPT ARGUMENTS...: the end of a shell whose work is shared by the processes that
# LAUNCHER_SETTINGS say; one by itself where they say nothing
start_processes() {
    local python=$1
    shift
    [ -n "$HOSTFILE" ] || NUM_PROCESSES=${NUM_PROCESSES:-1}
    launcher_flags
    if [ -z "$HOSTFILE" ] && [ "$NUM_PROCESSES" = 1 ]; then exec "$python" "$@"; fi
    exec "$python" "$HERE/llmops/launcher/launch.py" "${LAUNCH[@]}" "$@"
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

# lock_now PYTHON DESCRIPTOR [wait]: hold the lock of a file that this shell has open, for as long as it is; 3 where
# somebody else holds it, 4 on a file system without locks
lock_now() {
    "$1" -I -c '
import fcntl, sys
try:
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | (0 if sys.argv[2] else fcntl.LOCK_NB))
except BlockingIOError:
    sys.exit(3)
except OSError:
    sys.exit(4)' "$2" "${3:-}"
}

# ensure_python ROOT REQUIREMENTS: prints a Python that has the packages; makes ROOT/.venv when there is none
ensure_python() {
    local root=$1 requirements=$2 candidate held
    for candidate in python3 "$root/.venv/bin/python"; do
        if command -v "$candidate" >/dev/null && has_packages "$candidate" "$requirements"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    candidate=$(project_python "$root") || exit 2
    if mkdir -p "$root/.venv" && exec {held}>>"$root/.venv/.lock"; then # until this subshell ends
        lock_now "$candidate" "$held" || case $? in
        3)
            log "another start installs packages into $root/.venv; waiting for it"
            lock_now "$candidate" "$held" wait
            ;;
        *) log "warning: the file system of $root/.venv has no locks; let no second start install packages meanwhile" ;;
        esac
        if [ -x "$root/.venv/bin/python" ] && has_packages "$root/.venv/bin/python" "$requirements"; then
            printf '%s\n' "$root/.venv/bin/python"
            return
        fi
    fi
    log "installing the packages of ${requirements##*/} into $root/.venv (once; a few minutes)"
    # an earlier start may have been killed before its environment had pip
    "$root/.venv/bin/python" -c "import pip" 2>/dev/null || "$candidate" -m venv "$root/.venv" >&2 ||
        die "the virtual environment cannot be made; install the venv module of $candidate (Debian: python3-venv)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2 ||
        die "the packages of $requirements cannot be installed; see pip's message above"
    printf '%s\n' "$root/.venv/bin/python"
}
