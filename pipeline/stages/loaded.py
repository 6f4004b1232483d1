"""Data sets and stores that many runs in one process read, and what was loaded of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import cache
from pipeline import data
from pipeline.config.schema import Config
from pipeline.stages.inputs import in_fold, load_dataset
from pipeline.train.feeding.in_memory import Holdings


class Shared:
    """Each data set is loaded once, each store is opened once, and each image and feature read once.

    Of the folds of a cross-validation one is held at a time: what was loaded for the last is let go of with it.
    """

    def __init__(self, stores: Mapping[Path, cache.Store] = MappingProxyType({})) -> None:
        """Begin with stores that are open already, or know where and which they are."""
        self.holdings = Holdings()
        self._datasets: dict[str, data.Dataset] = {}
        self._fold: str | None = None
        self.stores: dict[Path, cache.Store] = dict(stores)

    def dataset(self, config: Config) -> data.Dataset:
        """The data set of a configuration, loaded once."""
        key = config.model_dump_json(include={"data", "fold"})
        fold = None if config.fold is None else key
        if fold != self._fold:
            if self._fold is not None:
                self._datasets.pop(self._fold, None)
                self.holdings = Holdings()
            self._fold = fold
        if key not in self._datasets:
            self._datasets[key] = in_fold(config, self._whole(config))
        return self._datasets[key]

    def _whole(self, config: Config) -> data.Dataset:
        """The data set apart from its folds, all of which share it."""
        if config.fold is None:
            return load_dataset(config)
        key = f"all folds of {config.data.model_dump_json()}"
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config, only_test=True)
        return self._datasets[key]

    def store(self, config: Config) -> cache.Store:
        """The store of a configuration, opened once."""
        path = config.store.path
        if path not in self.stores:
            self.stores[path] = cache.open_store(path)
        return self.stores[path]

    def close(self) -> None:
        """Close the stores."""
        for store in self.stores.values():
            store.close()
