"""Images: datasets, views of them, the training loader, and the batches of the probability shift."""
from .datasets import BrokenImageError, class_names, create_dataset
from .glyphs import Glyphs
from .loader import TrainLoader
from .shift_batches import StepBatches, preprocessing
from .views import DatasetView, split_held_out

__all__ = [
    'BrokenImageError', 'DatasetView', 'Glyphs', 'StepBatches', 'TrainLoader', 'class_names', 'create_dataset',
    'preprocessing', 'split_held_out',
]
