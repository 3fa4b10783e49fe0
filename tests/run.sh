#!/usr/bin/env bash
# Make the environment and run every check: linters, then the whole test suite.
#   bash tests/run.sh [pytest options]    (-n 0: one after the other)
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=llmops/environment.sh
source "$HERE/llmops/environment.sh"

PYTHON=$(ensure_python "$HERE" "$HERE/requirements-dev.txt") || exit 2
# The console's tests drive Chromium, those of a cluster make hosts with an sshd each; without these they are skipped and
# say so. Where an init system runs, installing openssh-server would open this machine to the network: not here, then.
wanted=()
command -v chromium >/dev/null || wanted+=(chromium)
command -v ip >/dev/null || wanted+=(iproute2)
command -v ssh >/dev/null || wanted+=(openssh-client)
[ -x /usr/sbin/sshd ] || [ -d /run/systemd/system ] || wanted+=(openssh-server)
if [ "${#wanted[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get install -qq --yes --no-install-recommends "${wanted[@]}"; } >&2 ||
        log "${wanted[*]} cannot be installed; tests of the console in a browser, or of a cluster, will be skipped"
fi
bin=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
cd "$HERE"
bash tests/lint.sh "$bin"
# A pretrained model for tests/real_model; without an index they are skipped and say so.
"$PYTHON" tests/real_model/fetch.py >&2 || log "no pretrained model can be fetched; the tests in tests/real_model will be skipped"
# A test mostly waits for a Python that imports torch, and some for a clock: a file more side by side than there are cores
# (8 at most).
workers=$(($(nproc) + 1))
exec "$PYTHON" -m pytest -n "$((workers < 8 ? workers : 8))" --dist loadfile --no-loadscope-reorder "$@"
