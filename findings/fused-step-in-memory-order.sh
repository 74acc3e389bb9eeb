#!/bin/sh
# torch on a CPU: a fused optimizer reads a gradient that is not contiguous in the order of memory.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > update.py <<'PYTHON'
import torch

print("torch", torch.__version__)
gradient = torch.arange(6.0).reshape(3, 2).t()  # as of a weight that is used transposed
found = {}
for kind in (torch.optim.SGD, torch.optim.AdamW):
    for fused in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(2, 3))
        parameter.grad = gradient
        optimizer = kind([parameter], lr=1.0, fused=fused)
        optimizer.step()
        # The first step of plain SGD is the gradient itself, AdamW's first moment a tenth of it.
        used = -parameter.detach() if kind is torch.optim.SGD else optimizer.state[parameter]["exp_avg"] * 10
        found[kind, fused] = used.round().int().tolist()
        print(f"{kind.__name__:5} fused={fused!s:5} gradient {gradient.int().tolist()}, used as {found[kind, fused]}")
    assert found[kind, False] == gradient.int().tolist()
    assert found[kind, True] == [[0, 1, 2], [3, 4, 5]], "the behaviour has changed"
PYTHON
venv/bin/python update.py
