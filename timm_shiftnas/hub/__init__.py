"""Model directories and the Hugging Face Hub: save, load, push."""
from .card import MARK, model_card
from .download import again, append_line, download, explained
from .load import SavedModel, from_pretrained, load_supernet, save_pretrained
from .push import published_files, push_directory, push_to_hub

__all__ = [
    'MARK', 'SavedModel', 'again', 'append_line', 'download', 'explained', 'from_pretrained', 'load_supernet',
    'model_card', 'published_files', 'push_directory', 'push_to_hub', 'save_pretrained',
]
