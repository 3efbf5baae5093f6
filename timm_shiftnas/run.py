"""Run another program, such as a script of timm, that knows the models of this package.

    python -m timm_shiftnas.run validate.py --model shiftformer_subnet ...
    torchrun --nproc-per-node=8 -m timm_shiftnas.run train.py --model shiftformer_tiny_supernet ...

The program runs as `python validate.py ...` would. Before it, `timm_shiftnas.patch` is imported, so that a training
script trains supernets with ShiftNAS.
"""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

__all__ = ['main']


def main() -> int:
    """Run the program that the command line names; it ends with its own exit code."""
    arguments = sys.argv[1:]
    if not arguments or not Path(arguments[0]).is_file():
        what = f'{arguments[0]} is not a file' if arguments else 'a script is missing'
        print(f'timm_shiftnas.run: error: {what}; type python -m timm_shiftnas.run SCRIPT.py [ARGUMENTS]',
              file=sys.stderr)
        return 2
    try:
        from . import patch  # noqa: F401
    except ImportError as error:  # of a timm with other tasks, whose other scripts still work
        print(f'timm_shiftnas.run: warning: supernets are not trained with ShiftNAS: {error}', file=sys.stderr)
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
