"""What `torchrun` starts in the tests: one process of a team, training in the folder that it is given."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import cache
from pipeline.train.augment import Augmentation
from pipeline.train.train import train
from tests.train.scenes import STEADY, TINY, make_dataset, register_tiny

if __name__ == "__main__":
    torch.set_num_threads(1)
    register_tiny()
    store = cache.open_store(sys.argv[1])
    augmentation = Augmentation(flip_horizontal=0.5, rotation_degrees=10)
    train(make_dataset(), store, Path(sys.argv[2]), model=TINY, options=STEADY, augmentation=augmentation)
