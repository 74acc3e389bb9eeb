#!/bin/sh
# torch on a CPU: a bfloat16 embedding that meets one token often gets a gradient of 256, however often.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > count.py <<'PYTHON'
import torch
from torch.nn.functional import embedding

ways = {
    "embedding": lambda weight, ids: embedding(ids, weight),
    "weight[ids]": lambda weight, ids: weight[ids],
    "index_select": lambda weight, ids: weight.index_select(0, ids),
}
print("torch", torch.__version__)
found = {}
for name, look_up in ways.items():
    for count in (256, 4096):
        weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
        look_up(weight, torch.zeros(count, dtype=torch.long)).sum().backward()
        found[name, count] = weight.grad[0, 0].item()
        print(f"{name:12} of one token {count:4} times: gradient {found[name, count]:.0f}, exact {count}")
assert found["embedding", 4096] == found["weight[ids]", 4096] == 256, "the behaviour has changed"
assert found["index_select", 4096] == 4096, "the behaviour has changed"
PYTHON
venv/bin/python count.py
