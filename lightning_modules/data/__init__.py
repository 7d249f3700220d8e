"""Vocabularies, batches, readers and data modules."""

from lightning_modules.data.batching import BucketBatchSampler, ResumableLoader, lengths, pad
from lightning_modules.data.memory import MemoryData
from lightning_modules.data.module import DataModule
from lightning_modules.data.pairs import PairBatch, PairCodec, PairData, Symbols
from lightning_modules.data.series import AnomalyData, SeriesBatch, SeriesCodec, SeriesData
from lightning_modules.data.sources import builtin_files, column, load_rows
from lightning_modules.data.speech import SpeechCodec, SpeechData
from lightning_modules.data.tagging import TaggingBatch, TaggingCodec, TaggingData
from lightning_modules.data.vocabulary import Vocabulary

__all__ = [
    "AnomalyData",
    "BucketBatchSampler",
    "DataModule",
    "MemoryData",
    "PairBatch",
    "PairCodec",
    "PairData",
    "ResumableLoader",
    "SeriesBatch",
    "SeriesCodec",
    "SeriesData",
    "SpeechCodec",
    "SpeechData",
    "Symbols",
    "TaggingBatch",
    "TaggingCodec",
    "TaggingData",
    "Vocabulary",
    "builtin_files",
    "column",
    "lengths",
    "load_rows",
    "pad",
]
