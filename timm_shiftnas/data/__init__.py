"""Images: datasets, views of them, loaders, and the batches of the probability shift."""
from .datasets import BrokenImageError, create_dataset
from .glyphs import Glyphs, find_fonts
from .in_memory import PixelImages, is_training, transformed
from .loader import TrainLoader
from .shift_batches import StepBatches, preprocessing
from .views import DatasetView, split_held_out

__all__ = [
    'BrokenImageError', 'DatasetView', 'Glyphs', 'PixelImages', 'StepBatches', 'TrainLoader', 'create_dataset',
    'find_fonts', 'is_training', 'preprocessing', 'split_held_out', 'transformed',
]
