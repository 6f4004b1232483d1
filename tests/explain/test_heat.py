"""Gates and Grad-CAM as arrays: equal to what the classifier used, and to what a slow hand computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.explain.heat import GRAD_CAM, MEAN, grad_cam, look, untrained_gates
from pipeline.explain.localise import SIDE, score_untrained
from pipeline.model.classifier import Classifier
from pipeline.model.geometry import sample_gate, sample_image
from pipeline.model.tasks import probabilities
from pipeline.train import trained_model
from pipeline.train.feeding.feed import Feed
from pipeline.train.forward import infer
from pipeline.train.train import train
from tests.explain.conftest import GATED, HEIGHT, PLAIN, WIDTH
from tests.train.scenes import QUICK


def feed_of(classifier, dataset, store, split="test"):
    options = classifier.options
    return Feed(
        dataset, split, store, taps=options.taps, image_px=options.image_px, device=torch.device("cpu"), place="host"
    )


@pytest.fixture
def seen(lesions, lesion_store, gated_run):
    classifier, description = trained_model.load_classifier(gated_run)
    feed = feed_of(classifier, lesions, lesion_store)
    return classifier, description, feed, look(classifier, description.head, feed, batch_size=5)


def test_the_probabilities_are_those_of_evaluation(seen):
    classifier, description, feed, heat = seen
    np.testing.assert_array_equal(heat.probabilities, infer(classifier, description.head, feed).probabilities)


def test_a_map_is_the_mean_over_channels_of_the_gate_on_the_image(seen):
    classifier, _, feed, heat = seen
    (batch,) = feed.batches([torch.arange(len(feed))])
    assert heat.names == ("early → stage1", "neck → stage4", MEAN, GRAD_CAM)
    by_hand = []
    for (tap, _), slca, name in zip(classifier.options.gates, classifier.gates, heat.names, strict=False):
        gate, visible = slca(batch.features[tap], batch.extents)
        assert float(visible[0, 0]) == HEIGHT / WIDTH
        full = sample_gate(gate, None, visible, (12, 16)).mean(dim=1)  # resized first, every channel
        by_hand.append(full.detach().numpy())
        np.testing.assert_allclose(heat.lay(name, range(len(feed)), (12, 16)), by_hand[-1], atol=1e-6)
    np.testing.assert_allclose(heat.lay(MEAN, [3, 1], (12, 16)), np.mean(by_hand, axis=0)[[3, 1]], atol=1e-6)


def test_padding_is_in_no_map(lesions, lesion_store, oracle_run):
    """The features of the padding say lesion; over the image they must not be seen."""
    classifier, description = trained_model.load_classifier(oracle_run)
    heat = look(classifier, description.head, feed_of(classifier, lesions, lesion_store))
    laid = heat.lay("neck → stage4", range(12), (HEIGHT, WIDTH))
    for values, index in zip(laid, lesions.indices("test"), strict=True):
        cells = lesions.mask(index)[::8, ::8].astype(float)  # (3, 4)
        expected = 1 / (1 + np.exp(-0.1 * cells))
        np.testing.assert_allclose(sample_gate(torch.tensor(expected)[None, None], None, None, (HEIGHT, WIDTH))[0, 0],
                                   values, atol=1e-6)  # fmt: skip
    assert heat.range("neck → stage4") == pytest.approx((0.5, 1 / (1 + np.exp(-0.1))), abs=1e-6)


def test_an_own_gate_is_shown_too(lesions, tmp_path):
    train(lesions, None, tmp_path, model=dataclasses.replace(GATED, gates=(("own", "stage2"),)),
          options=dataclasses.replace(QUICK, epochs=1))  # fmt: skip
    classifier, description = trained_model.load_classifier(tmp_path)
    feed = feed_of(classifier, lesions, None)
    heat = look(classifier, description.head, feed)
    assert heat.names == ("own → stage2", GRAD_CAM)
    (batch,) = feed.batches([torch.arange(len(feed))])
    from pipeline.model.backbones import standardise

    x = standardise(sample_image(batch.images, None, 16))
    with torch.no_grad():
        for stage in classifier.backbone.stages[:3]:
            x = stage(x)
        expected = classifier.gates[0](x, None)[0].mean(dim=1)
    np.testing.assert_allclose(heat.lay("own → stage2", range(12), expected.shape[1:]), expected, atol=1e-6)


def test_looking_leaves_no_hook(seen):
    classifier = seen[0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())


def test_the_plain_classifier_has_grad_cam_alone(lesions, tmp_path):
    train(lesions, None, tmp_path, model=PLAIN, options=dataclasses.replace(QUICK, epochs=1))
    classifier, description = trained_model.load_classifier(tmp_path)
    heat = look(classifier, description.head, feed_of(classifier, lesions, None))
    assert heat.names == (GRAD_CAM,)
    assert heat.lay(GRAD_CAM, [0, 1], (6, 8)).shape == (2, 6, 8)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_grad_cam_of_an_average_and_a_line_is_the_class_activation_map(head):
    """There a_k is w_ck / (h w): the map of Zhou et al., CVPR 2016."""
    torch.manual_seed(0)
    x, line = torch.randn(3, 6, 4, 5), nn.Linear(6, 4)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), line)
    classes = torch.tensor([2, 0, 3])
    expected = torch.relu(torch.einsum("bk,bkhw->bhw", line.weight[classes], x)) / 20
    found = grad_cam(net, head, x, classes)
    assert found.shape == (3, 1, 4, 5)
    torch.testing.assert_close(found[:, 0], expected.detach(), atol=1e-6, rtol=1e-5)
    assert found.max() > 0


def test_grad_cam_of_a_grade_climbs_its_log_probability():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3).double())
    gradient = torch.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = torch.zeros_like(x)
        step[place] = 1e-2
        up, down = (torch.log(probabilities("continuation", net(x + s * step))[0, 1]) for s in (1, -1))
        gradient[place] = (up - down) / 2e-2
    expected = torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * x).sum(dim=1))
    assert expected.max() > 0.01
    found = grad_cam(net.float(), "continuation", x.float(), torch.tensor([1]))
    torch.testing.assert_close(found[:, 0], F.relu(expected).float(), atol=1e-3, rtol=1e-2)


def test_untrained_gates_are_those_of_a_new_classifier_and_leave_the_random_state(seen):
    classifier, _, feed, _ = seen
    torch.manual_seed(7)
    fresh = Classifier(classifier.options, classifier.taps, feed.classes)
    for mine, theirs in zip(fresh.gates, classifier.gates, strict=True):
        assert not torch.equal(theirs.norm.scale, mine.norm.scale)
        mine.norm.load_state_dict(theirs.norm.state_dict())  # the scale of the features is known before the training
    before = torch.get_rng_state()
    _, found = untrained_gates(classifier, feed, range(len(feed)), seeds=(6, 7))
    assert torch.equal(torch.get_rng_state(), before)
    (batch,) = feed.batches([torch.arange(len(feed))])
    maps = fresh.gate_maps(batch.features, batch.extents, (6, 8))
    for laid, expected in zip(found.values(), maps, strict=True):
        torch.testing.assert_close(laid.lay(torch.arange(len(feed)), (6, 8)), expected.mean(dim=1).detach())


def test_untrained_gates_are_scored_without_an_image_and_read_what_they_need_once(seen, monkeypatch):
    classifier, _, feed, _ = seen
    cells = np.zeros((12, SIDE, SIDE), np.float16)
    cells[:, :40, 30:60] = 1
    kept = [position for position in range(len(feed)) if position not in (2, 5)]
    everything = score_untrained(classifier, feed, range(len(feed)), cells, seeds=3)
    read, stored = [], Feed.stored
    monkeypatch.setattr(Feed, "batches", None)
    monkeypatch.setattr(Feed, "stored", lambda self, *asked: (read.extend(asked[0].tolist()), stored(self, *asked))[1])
    found = score_untrained(classifier, feed, kept, cells[kept], seeds=3)
    assert read == kept
    assert found.keys() == everything.keys() == {"early → stage1", "neck → stage4"}
    assert all(len(set(aucs)) == 3 for aucs in found.values())
    alone = [score_untrained(classifier, feed, [position], cells[:1], seeds=3) for position in kept]
    for name, aucs in found.items():
        np.testing.assert_allclose(aucs, np.mean([one[name] for one in alone], axis=0), atol=1e-4)
