"""CLIP by name, for encoders and for classifiers: names, files, download, the two towers, texts. May import nothing.

Nothing is downloaded but by `download`. open_clip, an extra, is imported when the first model is asked for, and so is
torch: a name can be refused without them.
"""

from pipeline.clip.files import OWN, present_weights, weights_file
from pipeline.clip.hub import download
from pipeline.clip.library import import_open_clip
from pipeline.clip.names import CLIP, DEMO, is_clip, tags, without_folder
from pipeline.clip.texts import TEMPLATE, class_features, encode_classes, prompts, tokenizer
from pipeline.clip.towers import Architecture, architecture, build, read_architecture, resizing

__all__ = [
    "CLIP",
    "DEMO",
    "OWN",
    "TEMPLATE",
    "Architecture",
    "architecture",
    "build",
    "class_features",
    "download",
    "encode_classes",
    "import_open_clip",
    "is_clip",
    "present_weights",
    "prompts",
    "read_architecture",
    "resizing",
    "tags",
    "tokenizer",
    "weights_file",
    "without_folder",
]
