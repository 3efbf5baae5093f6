"""Training of supernets from the command line. Only this package and `timm_shiftnas_cli` parse arguments."""
