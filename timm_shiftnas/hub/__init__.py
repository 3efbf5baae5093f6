"""Model directories and the Hugging Face Hub: save, load, push."""
from .card import model_card
from .load import SavedModel, from_pretrained, load_supernet
from .push import push_directory, push_to_hub
from .save import save_pretrained

__all__ = [
    'SavedModel', 'from_pretrained', 'load_supernet', 'model_card', 'push_directory', 'push_to_hub', 'save_pretrained',
]
