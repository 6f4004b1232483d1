"""A finished run opened on a data set that it fits: its classifier, and a feed for each split that is asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from cache import Store
from pipeline.data import Dataset, Split
from pipeline.progress import Progress, silent
from pipeline.train import trained_model
from pipeline.train.feeding.feed import Feed
from pipeline.train.feeding.in_memory import Holdings
from pipeline.train.identity import check_classes, check_features, check_feed
from pipeline.train.train import Machine


class Trained:
    """A finished run on a data set.

    Attributes:
        classifier: The model, on its device and ready to predict.
        description: What `model.json` says of it.
        precision: What it computes in, as in training.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Dataset,
        store: Store | None,
        *,
        machine: Machine,
        allow_missing: bool = False,
        holdings: Holdings | None = None,
        progress: Progress = silent,
    ) -> None:
        """Open a run.

        Args:
            folder: A finished run.
            dataset: The data set it was trained on, or another one with the same classes.
            store: Its features; may be None for a classifier that reads none.
            machine: What to compute on.
            allow_missing: Feed the samples that the store has, where it lacks some.
            holdings: Images and features that others have loaded; None to share nothing.
            progress: Called while images are decoded.

        Raises:
            RunError: No finished run, other classes, or features of another fingerprint.
        """
        device = torch.device(machine.device)
        self.classifier, self.description = trained_model.load_classifier(folder, device=device)
        if store is not None:
            check_features(folder, self.description.fingerprint, store.fingerprint)
        check_classes(folder, self.description.task, self.description.class_names, dataset)
        self.precision: str = self.description.training["precision"]
        self._folder, self._dataset, self._store = folder, dataset, store
        self._machine, self._device = machine, device
        self._allow_missing, self._holdings, self._progress = allow_missing, holdings, progress

    def check(self, feed: Feed) -> None:
        """Refuse images that the run has used in another split; asked once they have been read.

        Raises:
            RunError: See `identity.check_feed`.
        """
        check_feed(self._folder, self._dataset, feed)

    def feed(self, split: Split) -> Feed:
        """The samples of a split, as the classifier takes them."""
        return Feed(
            self._dataset,
            split,
            self._store,
            taps=self.classifier.options.taps,
            image_px=self.classifier.options.image_px if self.classifier.options.reads_images else None,
            device=self._device,
            place=self._machine.place,
            workers=self._machine.workers,
            allow_missing=self._allow_missing,
            holdings=self._holdings,
            progress=self._progress,
        )
