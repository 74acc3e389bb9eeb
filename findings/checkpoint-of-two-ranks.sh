#!/bin/sh
# torch.distributed.checkpoint: the experts of two ranks under one name become a checkpoint with some of each.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > save.py <<'PYTHON'
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo")
rank = dist.get_rank()
# Every rank holds an expert of its own, and its state dict calls it as the other rank's does.
state = {f"layers.{i}.expert.weight": torch.full((8, 8), float(rank)) for i in range(6)}
dcp.save(state, checkpoint_id="checkpoint")
dist.destroy_process_group()
PYTHON
cat > load.py <<'PYTHON'
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")  # of loading in one process, which is meant
state = {f"layers.{i}.expert.weight": torch.full((8, 8), -1.0) for i in range(6)}
dcp.load(state, checkpoint_id="checkpoint")
owners = [int(tensor.unique().item()) for tensor in state.values()]
print("torch", torch.__version__)
print("save of different tensors under equal names on two ranks: no error, no warning")
print("rank whose tensor is in the checkpoint, layer by layer:", owners)
assert set(owners) == {0, 1}, "the behaviour has changed: the checkpoint is of one rank"
PYTHON
OMP_NUM_THREADS=1 venv/bin/torchrun --standalone --nproc-per-node 2 save.py 2> log || { cat log; exit 1; }
if grep -i warn log; then echo "the behaviour has changed: there is a warning"; exit 1; fi
venv/bin/python load.py
