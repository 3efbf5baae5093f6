"""Helpers that know nothing of architecture search: processes, files, random streams, counts with units, text."""
from .distributed import Ranks
from .files import FolderLock, atomic_write, find_cause, name_disk_errors, zip_is_intact
from .streams import seed_process, stream, stream_seed
from .text import one_line
from .units import format_count, parse_count

__all__ = [
    'FolderLock', 'Ranks', 'atomic_write', 'find_cause', 'format_count', 'name_disk_errors', 'one_line', 'parse_count',
    'seed_process', 'stream', 'stream_seed', 'zip_is_intact',
]
