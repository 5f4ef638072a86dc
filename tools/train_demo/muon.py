"""Muon (Keller Jordan, 2024; step sizes as in arXiv 2502.16982): momentum whose update of each weight matrix is made orthogonal."""
import torch


class Muon:
    """For every weight that is a matrix or a convolution of at least 16 × 16; AdamW for the rest, at the same learning rate."""

    def __init__(self, net, lr, momentum=0.95, weight_decay=0.0):
        named = list(net.named_parameters())
        is_matrix = lambda name, p: p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16 and "embedding" not in name
        self.matrices = [p for name, p in named if is_matrix(name, p)]
        self.averages = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW([p for name, p in named if not is_matrix(name, p)], lr=lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.by_shape = {}
        for i, p in enumerate(self.matrices):
            self.by_shape.setdefault(tuple(p.shape), []).append(i)

    @torch.no_grad()
    def step(self):
        for group in self.adam.param_groups:
            group["lr"] = self.lr
        self.adam.step()
        gradients = [p.grad for p in self.matrices]
        torch._foreach_lerp_(self.averages, gradients, 1 - self.momentum)
        directions = torch._foreach_lerp(gradients, self.averages, self.momentum)
        torch._foreach_mul_(self.matrices, 1 - self.lr * self.weight_decay)
        groups = [torch.stack([directions[i].flatten(1) for i in indices]) for indices in self.by_shape.values()]
        for (shape, indices), update in zip(self.by_shape.items(), orthogonal(groups)):
            # As large an update, root mean square, as Adam's usually is.
            update *= -self.lr * 0.2 * max(update.shape[1:]) ** 0.5
            for i, u in zip(indices, update):
                self.matrices[i].add_(u.view(shape))

    def zero_grad(self):
        for p in self.matrices:
            p.grad = None
        self.adam.zero_grad()

    def state_dict(self):
        return {"averages": self.averages, "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        torch._foreach_copy_(self.averages, state["averages"])
        self.adam.load_state_dict(state["adam"])


def orthogonal(groups, steps=5):
    """For each group [B, m, n], the nearest matrices with singular values near 1, by Newton–Schulz: x times a polynomial of x xᵀ
    at each step. The polynomials are multiplied with one another first, for x is up to twenty times as long as wide, and the
    squares of one size, whichever their group, together. In f32 proper: errors of the square grow tenfold a step, so those of
    TF32 or bf16 would drown it."""
    wide = [x if x.shape[1] <= x.shape[2] else x.mT for x in groups]
    wide = [x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7) for x in wide]
    products = [None] * len(wide)
    for side in {x.shape[1] for x in wide}:
        members = [i for i, x in enumerate(wide) if x.shape[1] == side]
        square, product = torch.cat([wide[i] @ wide[i].mT for i in members]), None
        for step in range(steps):
            polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
            polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
            product = polynomial if product is None else polynomial @ product
            if step + 1 < steps:
                square = polynomial @ square @ polynomial
        for i, p in zip(members, product.split([len(wide[i]) for i in members])):
            products[i] = p
    results = [p @ x for p, x in zip(products, wide)]
    return [y if y.shape == x.shape else y.mT for x, y in zip(groups, results)]
