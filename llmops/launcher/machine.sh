#!/usr/bin/env bash
# One machine of a run over several, started over ssh by llmops/launcher/ssh.py: machine.sh PYTHON
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
# shellcheck source=llmops/environment.sh
source llmops/environment.sh
[ -x "$1" ] || exit 102
has_gpu || tune_cpu
unset DS_ACCELERATOR # llmops/machine/devices.py chooses in each process
exec "$1" -u -m llmops.launcher.machine
