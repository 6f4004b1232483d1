"""Losses and probabilities of the four tasks against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.model.tasks import alignment_losses, balancing_weights, head_of, losses, outputs_of, probabilities


def test_each_task_has_its_head():
    heads = {task: head_of(task) for task in ("multiclass", "binary", "ordinal", "multilabel")}
    assert heads == {
        "multiclass": "softmax",
        "binary": "softmax",
        "ordinal": "continuation",
        "multilabel": "sigmoid",
    }
    assert head_of("ordinal", "cross_entropy") == "softmax"
    assert [outputs_of(head, 5) for head in ("softmax", "continuation", "sigmoid")] == [5, 4, 5]


def test_grades_follow_the_continuation_ratio_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # P(y > 0) = 1/2, P(y > 1 | y >= 1) = 3/4
    expected = torch.tensor([[1 / 2, 1 / 2 * 1 / 4, 1 / 2 * 3 / 4]])
    torch.testing.assert_close(probabilities("continuation", logits), expected)
    for grade in range(3):
        loss = losses("continuation", logits, torch.tensor([grade]))
        torch.testing.assert_close(loss, -expected[:, grade].log())


@pytest.mark.parametrize("head", ["softmax", "continuation"])
def test_probabilities_sum_to_one_even_for_extreme_outputs(head):
    logits = torch.tensor([[-500.0, 500.0, 3.0], [500.0, 500.0, -500.0]])
    p = probabilities(head, logits)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(2))
    assert torch.isfinite(losses(head, logits, torch.tensor([0, 1]))).all()


@pytest.mark.parametrize(("head", "low"), [("softmax", -20.0), ("sigmoid", -20.0), ("continuation", 20.0)])
def test_probabilities_are_as_exact_as_the_outputs(head, low):
    logits = torch.tensor([[low, 20.0], [low, 21.0]]) / (2 if head == "softmax" else 1)
    p = probabilities(head, logits.double())
    assert p.dtype == torch.float64
    assert p[0].max() < p[1].max()  # in float32 both are 1
    for narrow in (logits, logits.bfloat16()):
        said = probabilities(head, narrow)
        assert said.dtype == torch.float32
        torch.testing.assert_close(said, p.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_classes_cost_the_cross_entropy(smoothing):
    logits, labels, weights = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 1]), torch.rand(4)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(losses("softmax", logits, labels, smoothing=smoothing), expected)
    weighted = losses("softmax", logits, labels, class_weights=weights, smoothing=0.0)
    torch.testing.assert_close(weighted, F.cross_entropy(logits, labels, weight=weights, reduction="none"))


def test_several_labels_cost_the_mean_of_their_binary_cross_entropies():
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3))
    p = torch.sigmoid(logits)
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(losses("sigmoid", logits, labels), expected)
    torch.testing.assert_close(probabilities("sigmoid", logits), p)


def test_balancing_makes_classes_weigh_the_same():
    labels = np.array([0, 0, 0, 1, 2, 2])
    weights = balancing_weights("softmax", labels, 3)
    totals = [weights[k] * (labels == k).sum() for k in range(3)]
    assert totals == pytest.approx([2, 2, 2])
    assert weights[labels].mean() == pytest.approx(1)
    several = np.array([[1, 0], [0, 0], [0, 1], [0, 1]])
    assert balancing_weights("sigmoid", several, 2).tolist() == [3, 1]


def aligned_slowly(logits, labels):
    """Each pair of an image and a text of the batch on its own."""
    found = []
    for i in range(len(labels)):
        positives = [j for j in range(len(labels)) if labels[j] == labels[i]]
        said = 0.0
        for of_pair in (lambda a, b: logits[a, labels[b]], lambda a, b: logits[b, labels[a]]):  # to text, to image
            total = sum(math.exp(of_pair(i, j)) for j in range(len(labels)))
            for j in positives:
                said += -math.log(len(positives) * math.exp(of_pair(i, j)) / total) / len(positives) / 2
        found.append(said)
    return torch.tensor(found)


@pytest.mark.parametrize("labels", [[0, 1, 2, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 2, 0, 2, 0, 2]])
def test_alignment_is_the_contrast_of_all_pairs_of_a_batch(labels):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 3
    expected = aligned_slowly(logits, labels)
    torch.testing.assert_close(alignment_losses(logits, torch.tensor(labels)), expected)
    assert (expected > 0.001).all() or len(set(labels)) == 1


def test_alignment_wants_the_right_text_and_images_of_a_class_alike():
    labels = torch.tensor([0, 1, 0, 1])
    right = F.one_hot(labels, 2) * 50.0
    torch.testing.assert_close(alignment_losses(right, labels), torch.zeros(4))
    assert (alignment_losses(50.0 - right, labels) > 40).all()
    uneven = right + torch.tensor([[0.0], [0.0], [5.0], [0.0]])  # each image knows its class; the text prefers one
    assert losses("softmax", uneven, labels).max() < 1e-6
    assert alignment_losses(uneven, labels)[0] > 0.5


def test_alignment_is_differentiable_where_a_class_is_not_in_the_batch():
    logits = torch.zeros(3, 4, requires_grad=True)
    alignment_losses(logits, torch.tensor([0, 0, 1])).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[:, :2].abs().sum() > 0
    assert logits.grad[:, 2:].abs().sum() == 0
