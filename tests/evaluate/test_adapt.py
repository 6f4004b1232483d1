"""Class prompts and caches on CLIP's image features: the formula of Tip-Adapter, chosen on val, left as a run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline import records
from pipeline.errors import ConfigError, RunError
from pipeline.evaluate import adapt as module
from pipeline.evaluate.adapt import ALPHAS, BETAS, Texts, adapt
from pipeline.evaluate.compare import compare
from pipeline.evaluate.evaluate import evaluate
from pipeline.evaluate.probe import Fitting, probe
from pipeline.model.cached import CachedCosine
from pipeline.train import run_folder, trained_model
from pipeline.train.identity import recorded_identity
from pipeline.train.optimise import TrainOptions
from tests.train.scenes import make_dataset, make_store
from tests.train.test_features_alone import Unreadable

SIZE, CLASSES, DIGEST = 12, 3, "f" * 64
FIELDS = {"encoder": "clip:demo", "weights_sha256": DIGEST, "taps": {"embedding": "embedding"}}


@pytest.fixture
def scene(tmp_path):
    """Images whose features lie about a class centre each, and texts that lie near the centres, but not at them."""
    dataset = make_dataset((60, 45, 45), classes=CLASSES, task="multiclass")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, SIZE))
    features = 3 * centres[dataset.labels] + 4.0 * rng.standard_normal((len(dataset), SIZE))
    store = make_store(
        tmp_path / "s.zarr",
        dataset,
        taps={"embedding": (SIZE, 1, 1)},
        features={"embedding": features[:, :, None, None]},
        fields=FIELDS,
    )
    near = torch.from_numpy(centres + 1.0 * rng.standard_normal(centres.shape)).float()
    texts = Texts(F.normalize(near, dim=1), 14.0, {name: [f"a {name}"] for name in "abc"}, DIGEST)
    return dataclasses.replace(dataset, source=Unreadable()), store, texts


def run(scene, folder, method, **options):
    dataset, store, texts = scene
    return adapt(dataset, store, folder, Fitting(TrainOptions(**options), resamples=20), method=method, texts=texts)


def embedded(store, dataset, split):
    return F.normalize(torch.from_numpy(store.read(dataset.indices(split))["embedding"]).flatten(1), dim=1)


def test_zero_shot_is_the_cosine_with_the_class_prompts(scene, tmp_path):
    dataset, store, texts = scene
    found = run(scene, tmp_path / "run", "zero_shot", shots=1)
    (row,) = found["table"]
    assert (row["method"], row["setting"], row["chosen"]) == ("zero-shot", {}, True)
    classifier, description = trained_model.load_classifier(tmp_path / "run")
    read = torch.from_numpy(store.read(dataset.indices("test"))["embedding"])
    said = classifier(None, {"embedding": read})
    torch.testing.assert_close(said, 14.0 * embedded(store, dataset, "test") @ texts.classes.T)
    assert description.training["solver"] == "zero-shot"
    figures = evaluate(tmp_path / "run", dataset, store, resamples=20)
    assert figures["auc"] == pytest.approx(row["test"]["auc"], abs=1e-6)
    assert 0.6 < figures["auc"] < 0.999
    again = run(scene, tmp_path / "other", "zero_shot", shots=8)
    assert again["table"][0]["test"] == row["test"]  # it looks at no training image


def test_tip_adapter_is_its_formula_with_what_val_chooses(scene, tmp_path):
    dataset, store, texts = scene
    found = run(scene, tmp_path / "run", "tip", shots=4, seed=2)
    row = next(row for row in found["table"] if row["chosen"])
    assert row["method"] == "Tip-Adapter"
    assert {row["method"] for row in found["table"]} == {"zero-shot", "Tip-Adapter"}
    assert found["samples"]["train"] == 12
    used = [line["id"] for line in records.read_csv(tmp_path / "run/samples.csv") if line["split"] == "train"]
    at = [sample.id for sample in dataset.samples]
    rows = [at.index(name) for name in used]
    keys = F.normalize(torch.from_numpy(store.read(rows)["embedding"]).flatten(1), dim=1)
    onehot = torch.eye(CLASSES)[dataset.labels[rows]]

    def official(split, alpha, beta):
        """As the authors' code has it."""
        features = embedded(store, dataset, split)
        clip_logits = 14.0 * features @ texts.classes.T
        affinity = features @ keys.t()
        cache_logits = ((-1) * (beta - beta * affinity)).exp() @ onehot
        return clip_logits + cache_logits * alpha

    alpha, beta = row["setting"]["alpha"], row["setting"]["beta"]
    classifier, _ = trained_model.load_classifier(tmp_path / "run")
    read = torch.from_numpy(store.read(dataset.indices("test"))["embedding"])
    torch.testing.assert_close(classifier(None, {"embedding": read}), official("test", alpha, beta))
    from sklearn.metrics import roc_auc_score

    labels = dataset.labels[dataset.indices("val")]
    best = max(
        roc_auc_score(labels, official("val", a, b).double().softmax(1), multi_class="ovr")
        for a in ALPHAS
        for b in BETAS
    )
    assert row["val"]["auc"] == pytest.approx(best, abs=1e-6)
    assert len(run_folder.read_history(tmp_path / "run")) == len(ALPHAS) * len(BETAS)


def test_tip_adapter_f_tunes_its_keys_and_is_compared_and_repeated(scene, tmp_path):
    dataset, store, _ = scene
    found = run(scene, tmp_path / "f", "tip_f", shots=8)
    row = next(row for row in found["table"] if row["chosen"])
    assert 1 <= row["setting"]["epoch"] <= 20
    tip = next(row for row in found["table"] if row["method"] == "Tip-Adapter")
    assert row["val"]["auc"] >= max(other["val"]["auc"] for other in found["table"]) - 0.05
    history = run_folder.read_history(tmp_path / "f")
    assert history[19]["train_loss"] < history[0]["train_loss"]
    run(scene, tmp_path / "tip", "tip", shots=8)
    tuned, plain = (trained_model.load_classifier(tmp_path / name)[0].backbone.head[-1] for name in ("f", "tip"))
    assert torch.equal(tuned.values, plain.values)
    assert not torch.equal(tuned.keys, plain.keys)
    for name in ("f", "tip"):
        evaluate(tmp_path / name, dataset, store, resamples=20)
    told = compare(tmp_path / "f", tmp_path / "tip", resamples=20)
    assert told["scores"]["auc"]["first"] == pytest.approx(row["test"]["auc"], abs=1e-6)
    run(scene, tmp_path / "again", "tip_f", shots=8)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("f", "again"))
    assert first == second
    assert tip["chosen"] is False


def test_test_labels_choose_nothing(scene, tmp_path):
    dataset, store, texts = scene
    first = run(scene, tmp_path / "a", "tip_f", shots=4)
    turned = tuple(
        dataclasses.replace(s, label=(s.label + 1) % CLASSES) if s.split == "test" else s for s in dataset.samples
    )
    other = run((dataclasses.replace(dataset, samples=turned), store, texts), tmp_path / "b", "tip_f", shots=4)
    chosen = [next(row for row in found["table"] if row["chosen"]) for found in (first, other)]
    assert chosen[0]["setting"] == chosen[1]["setting"]
    assert chosen[0]["test"]["auc"] > chosen[1]["test"]["auc"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_what_a_run_depends_on_is_recorded_and_another_is_refused(scene, tmp_path):
    run(scene, tmp_path / "run", "tip", shots=4)
    settings = recorded_identity(tmp_path / "run")
    assert settings["train"]["method"] == "tip"
    assert settings["train"]["prompts"] == {"a": ["a a"], "b": ["a b"], "c": ["a c"]}
    assert settings["model"]["cached"] == 12
    run(scene, tmp_path / "run", "tip", shots=4)  # the same again is left as it is
    with pytest.raises(RunError, match=r"train.method is 'tip_f' and was 'tip'"):
        run(scene, tmp_path / "run", "tip_f", shots=4)


def test_the_probe_takes_the_image_feature(scene, tmp_path):
    dataset, store, _ = scene
    found = probe(dataset, store, tmp_path / "run", Fitting(resamples=20))
    assert found["chosen"] == ["embedding"]
    assert "head" not in recorded_identity(tmp_path / "run")["model"]
    assert evaluate(tmp_path / "run", dataset, store, resamples=20)["auc"] > 0.7


def test_what_does_not_fit_is_refused(scene, tmp_path):
    dataset, store, texts = scene
    other = dataclasses.replace(texts, weights_sha256="0" * 64)
    with pytest.raises(RunError, match=r"holds image features of the weights 'ffffffffffff' of 'clip:demo', and the"):
        adapt(dataset, store, tmp_path / "run", method="tip", texts=other)
    graded = dataclasses.replace(dataset, task="ordinal")
    with pytest.raises(ConfigError, match=r"the task is 'ordinal': set probe.method to 'linear', or train.loss"):
        adapt(graded, store, tmp_path / "run", method="tip", texts=texts)
    assert not (tmp_path / "run").exists()


def test_a_head_without_a_cache_adds_nothing():
    head = CachedCosine(4, 2)
    head.classes.data = torch.eye(2, 4)
    head.scale.fill_(5.0)
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0, 0, 0, 9, 9]])), torch.tensor([[3.0, 4.0]]))
    assert module.ADAPTERS.keys() == {"zero_shot", "tip", "tip_f"}
