"""Helpers that know nothing of architecture search: processes, files, paths, random streams, counts, text."""
from .distributed import Ranks
from .files import FolderLock, atomic_write, find_cause, name_disk_errors, zip_is_intact
from .paths import expand_home
from .streams import seed_process, stream, stream_seed
from .text import one_line
from .units import format_count, parse_count
from .yaml_files import read_yaml

__all__ = [
    'FolderLock', 'Ranks', 'atomic_write', 'expand_home', 'find_cause', 'format_count', 'name_disk_errors', 'one_line',
    'parse_count', 'read_yaml', 'seed_process', 'stream', 'stream_seed', 'zip_is_intact',
]
