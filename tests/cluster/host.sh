#!/usr/bin/env bash
# The first process of a test's host: host.sh NAME FOLDER SSHD, inside its own namespaces.
set -euo pipefail
hostname "$1"
mount -t proc proc /proc
mount -t sysfs sysfs /sys # the network devices of this host
mount -t tmpfs tmpfs /run
mkdir -m 0755 /run/sshd
mount --bind "$2/$1.hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
if [ -d "$HOME/.ssh" ]; then mount -t tmpfs tmpfs "$HOME/.ssh"; fi
read -r _ # until the network is there
touch "$2/$1.ready"
exec "$3" -D -e -f "$2/sshd_config"
