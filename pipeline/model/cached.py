"""A head of CLIP's image features that learns nothing or little: class prompts, and a cache of training images.

For an image feature f of length one, with the embedding w_k of each class, CLIP's temperature exp(s), and the features
F (n, E) and one-hot labels L (n, K) of training images,

    logits = exp(s) f w^T + alpha exp(-beta (1 - f F^T)) L

Without a cache it is CLIP's zero-shot classifier; with one it is Tip-Adapter, and with keys F that were fine-tuned
Tip-Adapter-F (Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CachedCosine(nn.Module):
    """The head; what it holds is set by `fill`.

    Args:
        size: E.
        classes: K.
        cached: n; 0 for none.

    Attributes:
        classes: (K, E), of length one.
        scale: exp(s).
        keys: (n, E), F.
        values: (n, K), L.
        alpha: Weight of the cache.
        beta: How near an image must be to count.
    """

    scale: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, size: int, classes: int, cached: int = 0) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.zeros(classes, size), requires_grad=False)
        self.keys = nn.Parameter(torch.zeros(cached, size), requires_grad=False)
        self.register_buffer("values", torch.zeros(cached, classes))
        for name, value in (("scale", 1.0), ("alpha", 0.0), ("beta", 1.0)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, features: Tensor) -> Tensor:
        """Classify: (B, E or more), of which the first E are the image feature of any length, to logits (B, K)."""
        f = F.normalize(features[:, : self.classes.shape[1]].float(), dim=1)
        logits: Tensor = self.scale * (f @ self.classes.T)
        if len(self.keys):
            logits = logits + self.alpha * (near(f @ self.keys.T, self.beta) @ self.values)
        return logits


def near(cosines: Tensor, beta: Tensor | float) -> Tensor:
    """How much each cached image counts: exp(-beta (1 - cosine))."""
    return (-beta * (1 - cosines)).exp()
