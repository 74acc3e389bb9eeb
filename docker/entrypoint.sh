#!/bin/sh
# What the container runs under tini. `train ...` starts RANKS processes on this node (default: its GPUs, or one) and ends
# with the run's own exit code; everything else is a command of epmoe.
set -eu

refuse() {
    echo "error: $1" >&2
    exit 2
}

[ "$(id -u)" -ne 0 ] || refuse "this image runs as user 10001, and root's files in /out would be nobody else's; fix: remove --user, or give the number of an ordinary user"
for folder in /out /cache; do
    [ -w "$folder" ] || refuse "user $(id -u) cannot write to $folder; fix: chown 10001 the folder that is mounted there, or --user with the number of its owner"
done

case ${1:-} in
    train) ;;
    torchrun | deepspeed) exec epmoe launch -- "$@" ;;
    *) exec epmoe "$@" ;;
esac

ranks=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
case $ranks in
    *[!0-9]*) refuse "RANKS=$ranks is not a number; fix: the processes of this node, or leave it out for one on each GPU" ;;
esac
[ "$ranks" -gt 0 ] || ranks=1
shared_mib=$(df --output=size --block-size=1M /dev/shm | tail -n 1 | tr -d ' ')
[ "$shared_mib" -ge 64 ] || refuse "/dev/shm has $shared_mib MiB, and ranks and loaders share memory through it; fix: --shm-size=1g, or an emptyDir of medium Memory"

# Kubernetes and other launchers tell torchrun of several nodes through PET_ variables.
if [ -n "${PET_NNODES:-}" ]; then
    export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-$ranks}"
    exec epmoe launch -- torchrun -m epmoe "$@"
fi
exec epmoe launch -- torchrun --standalone --nproc-per-node "$ranks" -m epmoe "$@"
