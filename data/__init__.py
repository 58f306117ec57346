"""Floor 4: corpora, mixed-modal sequences in memory-mapped shards, and the resumable sampler."""

from coterie.data.batch import IGNORE, Batch, collate
from coterie.data.build import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    Built,
    Progress,
    build_digits,
    build_directory,
    prepare,
)
from coterie.data.config import DataConfig
from coterie.data.images import read_image, to_grey
from coterie.data.manifest import Manifest
from coterie.data.sampler import Sampler, each_row
from coterie.data.shards import TokenDataset, open_dataset
from coterie.data.vocabulary import IMAGE, MODALITIES, TEXT, Vocabulary
from coterie.data.writer import DatasetWriter, write_dataset

__all__ = [
    "IGNORE",
    "IMAGE",
    "IMAGE_SUFFIXES",
    "MODALITIES",
    "TEXT",
    "TEXT_SUFFIXES",
    "Batch",
    "Built",
    "DataConfig",
    "DatasetWriter",
    "Manifest",
    "Progress",
    "Sampler",
    "TokenDataset",
    "Vocabulary",
    "build_digits",
    "build_directory",
    "collate",
    "each_row",
    "open_dataset",
    "prepare",
    "read_image",
    "to_grey",
    "write_dataset",
]
