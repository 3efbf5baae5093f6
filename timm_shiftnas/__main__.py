"""`python -m timm_shiftnas`, the same as `timm-shiftnas`."""
import sys

from timm_shiftnas_cli import main

if __name__ == '__main__':
    sys.exit(main())
