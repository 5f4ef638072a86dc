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


class Threads:
    """Uses one thread or all of `limit`, whichever is faster now: on cores that others use too, one straggler holds up the
    rest. Every 60 steps tries each for three."""

    def __init__(self, limit):
        self.choices, self.step, self.times, self.last = sorted({1, limit}), 0, {}, None

    def tick(self):
        """To be called before each step."""
        now, tried = time.monotonic(), torch.get_num_threads()
        if self.last is not None and self.step < 3 * len(self.choices):
            self.times.setdefault(tried, []).append(now - self.last)
        self.step += 1
        if self.step < 3 * len(self.choices):
            torch.set_num_threads(self.choices[self.step // 3])
        elif self.step == 3 * len(self.choices):
            torch.set_num_threads(min(self.choices, key=lambda n: sum(sorted(self.times[n])[:2])))
        elif self.step == 60:
            self.step, self.times = 0, {}
            torch.set_num_threads(self.choices[0])
        self.last = time.monotonic()
