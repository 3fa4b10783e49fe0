#!/usr/bin/env bash
# Make the virtual environments of the two peers: DIR/trl and DIR/llamafactory.
#
# usage: install.sh DIR        (PYTHON=... picks the interpreter, 3.11 by default)
#
# Packages come from whatever index pip is set up with. Point it at CPU-only torch wheels (for instance with
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) to keep the CUDA libraries out. Running the script again changes nothing
# that is in place already.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi

target=$1
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3.11}

make_env() {
    local folder=$1 requirements=$2
    if [[ ! -x $folder/bin/python ]]; then
        "$python" -m venv "$folder"
    fi
    "$folder/bin/python" -m pip install --quiet -r "$requirements"
}

mkdir -p -- "$target"
make_env "$target/trl" "$here/requirements-trl.txt"
make_env "$target/llamafactory" "$here/requirements-llamafactory.txt"

# llamafactory asks for torchaudio and torchvision, which have no wheels that load beside a CPU-only torch, and for
# web server packages that training does not use, so it is installed without its dependencies.
"$target/llamafactory/bin/python" -m pip install --quiet --no-deps llamafactory==0.9.5

"$target/trl/bin/python" -c 'import importlib.metadata as m; print("trl", m.version("trl"))'
"$target/llamafactory/bin/python" -c 'import importlib.metadata as m; print("llamafactory", m.version("llamafactory"))'
