"""The four tasks: what the head of a classifier puts out, its loss, and the probabilities it stands for.

A head is `softmax` (one class of K), `continuation` (one grade of K in order) or `sigmoid` (any of K labels). The
continuation-ratio head has K - 1 outputs z with P(y > k | y >= k) = sigmoid(z_k), so

    P(y = k) = (1 - sigmoid(z_k)) * product over j < k of sigmoid(z_j)

is a distribution whatever the outputs are, and its negative logarithm is the loss (McCullagh, 1980; with networks: Shi,
Cao and Raschka, 2021). Choosing it for ordered grades is ours; MedMNIST trains them as plain classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Task = Literal["multiclass", "binary", "ordinal", "multilabel"]
Head = Literal["softmax", "continuation", "sigmoid"]
Loss = Literal["auto", "cross_entropy"]


def head_of(task: Task, loss: Loss = "auto") -> Head:
    """Choose the head of a task: `"cross_entropy"` takes grades as plain classes."""
    if task == "multilabel":
        return "sigmoid"
    return "continuation" if task == "ordinal" and loss == "auto" else "softmax"


def outputs_of(head: Head, classes: int) -> int:
    """Count the numbers that a head needs for so many classes."""
    return classes - 1 if head == "continuation" else classes


def probabilities(head: Head, logits: Tensor) -> Tensor:
    """Turn outputs (B, outputs) into probabilities (B, K): rows sum to one, except for `sigmoid`.

    They are float64 where the outputs are, else float32, in which all above 1 - 3e-8 are the same.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.sigmoid(logits) if head == "sigmoid" else _log_probabilities(head, logits).exp()


def losses(
    head: Head, logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Compute the loss of each sample.

    Args:
        head: What `logits` stand for.
        logits: (B, outputs).
        labels: (B,) int64 class numbers; for `sigmoid` (B, K) of 0 and 1.
        class_weights: (K,) float32, weight of a sample by its class; for `sigmoid`, of each positive label.
        smoothing: Share of the target that is spread evenly: over the classes, or over yes and no for `sigmoid`.

    Returns:
        (B,) float32; their mean is the loss of the batch.
    """
    if head == "sigmoid":
        targets = labels.float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(
            logits.float(), targets, pos_weight=class_weights, reduction="none"
        ).mean(dim=1)
    log_p = _log_probabilities(head, logits.float())
    loss = -log_p.gather(1, labels[:, None]).squeeze(1)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(dim=1)
    return loss if class_weights is None else loss * class_weights[labels]


def alignment_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the image-text contrast of a batch, in which the texts of all samples of a class are the same.

    The text of sample j is the prompt of its class, so the similarity of image i and text j is s_ij = logits[i, y_j],
    and the positives of i (of j) are the n_i samples of its class. For both directions the target is uniform over the
    positives, and the loss of sample i is the mean of the two divergences from it:

        image to text   -log n_i - sum over positives j of log softmax_j(s_ij) / n_i
        text to image   -log n_i - sum over positives j of log softmax_j(s_ji) / n_i

    Source: Radford et al., ICML 2021, for the symmetric contrast; uniform targets over the samples of a class: Yang et
    al., "Unified contrastive learning in image-text-label space", CVPR 2022. That MedFocusCLIP's term is this one is
    our reading of its figure. Subtracting the entropy log n_i is ours: it moves no gradient, and 0 is then the best.

    Args:
        logits: (B, K), the temperature times the cosine of each image with each class's prompt.
        labels: (B,) int64 class numbers.

    Returns:
        (B,) float32, not negative.
    """
    logits = logits.float()
    classes = F.one_hot(labels, logits.shape[1]).to(logits)  # (B, K)
    of_class = classes.sum(dim=0)  # (K,): samples
    to_text = torch.logsumexp(logits + of_class.log(), dim=1) - (logits + of_class.clamp(min=1).log()).gather(
        1, labels[:, None]
    ).squeeze(1)
    over_images = F.log_softmax(logits, dim=0)  # (B, K): of each text over the images
    to_image = -(over_images * classes).sum(dim=0) / of_class.clamp(min=1) - of_class.clamp(min=1).log()  # (K,)
    return (to_text + to_image[labels]) / 2


def balancing_weights(head: Head, labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Weigh each class by how rare it is: (K,).

    A sample of class c weighs n / (K n_c), which is 1 on average; for `sigmoid`, a positive label weighs as many as
    there are negatives for it, at most 100.
    """
    if head == "sigmoid":
        positives = np.maximum(labels.sum(axis=0), 1)
        return np.asarray(np.minimum((len(labels) - positives) / positives, 100), dtype=np.float32)
    counts = np.bincount(labels, minlength=classes)
    return np.asarray(len(labels) / (classes * np.maximum(counts, 1)), dtype=np.float32)


def _log_probabilities(head: Head, logits: Tensor) -> Tensor:
    if head == "softmax":
        return F.log_softmax(logits, dim=1)
    reached = F.pad(F.logsigmoid(logits).cumsum(dim=1), (1, 0))  # (B, K): log P(y >= k)
    stopped = F.pad(F.logsigmoid(-logits), (0, 1))  # (B, K): log P(y = k | y >= k); the last grade stops for sure
    return reached + stopped
