"""Training a supernet from the command line: the only package that knows argparse, beside `cli`."""
