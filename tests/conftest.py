"""One thread, here and in the processes that tests start: the models are too small to gain from more."""
import os

os.environ['OMP_NUM_THREADS'] = '1'  # read when torch is imported, which the tests do after this
