"""Data sets as `datasets` with the columns image, label and id; labeled and unlabeled splits; views and streams."""

from .cityscapes import load_cityscapes
from .folder import load_folder
from .hub_dataset import load_hub
from .labels import LabelEncoding
from .partitions import Partition, partition
from .voc import load_voc

__all__ = [
    "LabelEncoding",
    "Partition",
    "load_cityscapes",
    "load_folder",
    "load_hub",
    "load_voc",
    "partition",
]
