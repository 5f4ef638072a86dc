"""Counts what a HiPer step asks of a UNet: operations of the direct algorithms, what is executed, and bytes.

    $PEER_PYTHON tools/bench/operations.py MODEL [PIXELS]

Nothing is computed: the network runs on torch's meta device. "Executed" is what the engine's algorithms leave (Winograd's
factor; scores computed again by attention's gradient), and of the gradient what the tail needs: nothing before the first
cross-attention, nothing to the timestep's embedding, keys and values of the tail's rows alone. Bytes are one pass over weights,
inputs and outputs in f32.
"""

import collections
import sys

import torch
from diffusers import UNet2DConditionModel

TOKENS, TAIL = 77, 5

model, pixels = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 512
with torch.device("meta"):
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model, subfolder="unet")).eval()

parts = collections.defaultdict(collections.Counter)
tail_seen = False  # Whether the tail has entered: what comes before needs no gradient.


def count(part, flops, executed, gradient, elements, gradient_elements):
    parts[part].update(
        direct=flops / 1e9,
        forward=executed / 1e9,
        gradient=gradient / 1e9,
        forward_bytes=4 * elements / 1e9,
        gradient_bytes=4 * gradient_elements / 1e9,
    )


def hook(name, module):
    def counted(_, inputs, output):
        global tail_seen
        x = inputs[0]
        elements = x.numel() + output.numel() + sum(p.numel() for p in module.parameters())
        share = float(tail_seen and "time" not in name)
        if isinstance(module, torch.nn.Conv2d):
            flops = 2 * output.numel() * module.weight[0].numel()
            side = min(output.shape[2:])
            part, factor = "other convolutions", 1
            if module.kernel_size == (3, 3) and module.stride == (1, 1) and side > 8:
                part, factor = ("3×3, F(4×4)", 4) if side >= 24 else ("3×3, F(2×2)", 2.25)
            count(part, flops, flops / factor, share * flops / factor, elements, share * elements)
        elif isinstance(module, torch.nn.Linear):
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                tail_seen, share = True, TAIL / TOKENS
            flops = 2 * output.numel() * module.in_features
            count("linear layers", flops, flops, share * flops, elements, (share > 0) * elements)
        else:
            count("norms", 0, 0, 0, elements, share * 1.5 * elements)

    return counted


for name, module in unet.named_modules():
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm)):
        module.register_forward_hook(hook(name, module))

attend = torch.nn.functional.scaled_dot_product_attention


def counted_attention(q, k, v, **options):
    y = attend(q, k, v, **options)
    flops = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
    elements = 2 * q.numel() + k.numel() + v.numel()
    count("attention", flops, flops, tail_seen * 2.5 * flops, elements, tail_seen * 2 * elements)
    return y


torch.nn.functional.scaled_dot_product_attention = counted_attention
with torch.device("meta"):
    side = pixels // 8
    text = torch.empty(1, TOKENS, unet.config.cross_attention_dim)
    unet(torch.empty(1, unet.config.in_channels, side, side), 500, text)

columns = ["direct", "forward", "gradient", "forward_bytes", "gradient_bytes"]
print("| part | direct, GFLOP | executed forward | executed gradient | GB forward | GB gradient |")
print("| --- | --- | --- | --- | --- | --- |")
total = collections.Counter()
for part, counts in [*parts.items(), ("sum", total)]:
    total.update(counts if part != "sum" else {})
    print(f"| {part} | " + " | ".join(f"{counts[c]:.0f}" if "bytes" not in c else f"{counts[c]:.1f}" for c in columns) + " |")
