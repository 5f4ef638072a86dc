"""Copies a checkpoint in the diffusers layout with its weights in f16.

    $PEER_PYTHON tools/bench/to_f16.py FROM TO

Other files are copied as they are; tensors that are not floating-point keep their type. One file is in memory at a time.
"""
import pathlib
import shutil
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

source, target = map(pathlib.Path, sys.argv[1:3])
for path in sorted(p for p in source.rglob("*") if p.is_file()):
    copy = target / path.relative_to(source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        shutil.copyfile(path, copy)
        continue
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    tensors = {name: t.to(torch.float16) if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            sys.exit(f"{path}: {name} does not fit into f16")
    save_file(tensors, copy, metadata=metadata)
    print(copy)
