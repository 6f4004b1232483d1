"""Data sets and stores that many runs in one process read, and what was loaded of them."""

from __future__ import annotations

from pathlib import Path

import cache
from pipeline import data
from pipeline.config.schema import Config
from pipeline.stages.inputs import load_dataset
from pipeline.train.feeding.in_memory import Holdings


class Shared:
    """Each data set is loaded once, each store is opened once, and each image and feature read once."""

    def __init__(self) -> None:
        self.holdings = Holdings()
        self._datasets: dict[str, data.Dataset] = {}
        self._stores: dict[Path, cache.Store] = {}

    def dataset(self, config: Config) -> data.Dataset:
        """The data set of a configuration, loaded once."""
        key = config.data.model_dump_json()
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config)
        return self._datasets[key]

    def store(self, config: Config) -> cache.Store:
        """The store of a configuration, opened once."""
        path = config.store.path
        if path not in self._stores:
            self._stores[path] = cache.open_store(path)
        return self._stores[path]

    def close(self) -> None:
        """Close the stores."""
        for store in self._stores.values():
            store.close()
