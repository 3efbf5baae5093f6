"""Folders of the repository."""
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / 'tests' / 'support' / 'data'  # figures and tensors of the reference implementations
