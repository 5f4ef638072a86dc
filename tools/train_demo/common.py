"""What the stages of training share."""
import os
import time

import torch


def learning_rate(base, samples, total, step, warmup, decay):
    """Warm-up over `warmup` steps, then constant, then a straight line down over the last `decay` of `total` samples."""
    return base * min(1, step / warmup) * min(1, max(0.02, (total - samples) / (decay * total)))


def has_bf16(device):
    """Whether products in bf16 are faster than in f32; on a CPU without instructions for them they take ten times as long."""
    return device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def save(state, path):
    """Atomically: a run that is cut off leaves the file before or the file after."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


class Every:
    """Says when so many seconds have passed."""

    def __init__(self, seconds):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self):
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
