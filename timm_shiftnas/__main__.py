"""`python -m timm_shiftnas` is `timm-shiftnas`."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
