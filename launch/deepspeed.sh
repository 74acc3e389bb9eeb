#!/bin/bash
# epmoe under DeepSpeed's launcher, with its ZeRO engine: one rank per GPU; ends with the run's own exit code.
#
#   CONFIG=my.yaml OUT=runs/zero launch/deepspeed.sh [KEY=VALUE...]                          on this machine
#   HOSTFILE=hosts MASTER_ADDR=10.0.0.1 NODE_RANK=0 CONFIG=... OUT=... launch/deepspeed.sh    on every node of several
#
# HOSTFILE has a line `host slots=8` per node; MASTER_ADDR is the first one's address on the network between the nodes.
# Then CONFIG, OUT and CACHE, which holds the prepared text, lie on a disk that all nodes see. Nothing goes through ssh,
# so that every node's launcher has a parent that passes SIGTERM on, and ends what it leaves behind: DeepSpeed's own
# command would leave its ranks training. That launcher kills a rank 30 s after it was asked to stop, whatever --grace says.

stop_here() { echo "error: $1" >&2; exit 2; }
[[ ${CONFIG:-} ]] || stop_here "CONFIG is not set; give the YAML file to train: CONFIG=... OUT=... launch/deepspeed.sh"
[[ ${OUT:-} ]] || stop_here "OUT is not set; give the run's folder: CONFIG=... OUT=... launch/deepspeed.sh"

if [[ ${HOSTFILE:-} ]]; then
  [[ ${MASTER_ADDR:-} ]] || stop_here "MASTER_ADDR is not set; give the first node's address, the same on all nodes"
  [[ ${NODE_RANK:-} ]] || stop_here "NODE_RANK is not set; give this node's number, 0 on the first"
  getent ahosts "$MASTER_ADDR" >/dev/null || stop_here "MASTER_ADDR=$MASTER_ADDR does not resolve on $(hostname)"
  where=(--hostfile="$HOSTFILE" --no_ssh --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR")
else
  where=(--num_gpus="${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU)}")
  [[ ${where[0]} != --num_gpus=0 ]] || stop_here "there are no GPUs here; on CPUs say how many ranks: RANKS=2"
fi
exec epmoe launch --grace=120 -- deepspeed "${where[@]}" --master_port="${MASTER_PORT:-29500}" --no_local_rank \
  --module epmoe train "$CONFIG" "out=$OUT" parallel.engine=deepspeed ${CACHE:+"data.cache=$CACHE"} "$@"
