#!/bin/bash
# epmoe on this machine: one rank per GPU, without GPUs two; ends with the run's own exit code.
#
#   CONFIG=configs/quickstart.yaml OUT=runs/quickstart RANKS=2 launch/local.sh [KEY=VALUE...]
#
# CACHE holds the prepared text; without it, what the configuration says. Stop: Ctrl-C, or SIGTERM to this process; the
# same line goes on. There is no queue here; a supervisor should start it again after every code but 0, 2 to 6 and 93.

stop_here() { echo "error: $1" >&2; exit 2; }
[[ ${CONFIG:-} ]] || stop_here "CONFIG is not set; give the YAML file to train: CONFIG=... OUT=... launch/local.sh"
[[ ${OUT:-} ]] || stop_here "OUT is not set; give the run's folder: CONFIG=... OUT=... launch/local.sh"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)
ranks=${RANKS:-$((gpus ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
exec epmoe launch --grace=120 -- torchrun --standalone --nproc-per-node="$ranks" --max-restarts=0 \
  -m epmoe train "$CONFIG" "out=$OUT" ${CACHE:+"data.cache=$CACHE"} "$@"
