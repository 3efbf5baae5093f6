"""Run timm's own model tests on the models that this package registers.

    python tests/integration/timm_contract/run.py              # pip downloads the tests of the installed timm
    python tests/integration/timm_contract/run.py timm/tests/test_models.py [pytest options]

timm ships this file in its source distribution only, so it is not part of this repository. It imports `TORCH_BACKEND`
before it lists models. A copy of it in a temporary directory gets our names in its lists:

* models without the spatial features of a CNN: the ViTs;
* modules with `forward_intermediates`: ours;
* excluded: TorchScript and FX for supernets, whose forward takes an arch, and for elastic pretrained networks (other
  subnets pass both), and the check that every
  parameter has a gradient for supernets whose full network does not use all of them: OFA's kernel matrices, and
  shortcut projections that only narrower archs use.

A minute on two cores.
"""
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

import timm_shiftnas  # noqa: F401

ADDED = {
    'NON_STD_FILTERS': ['*shiftformer_*', 'elastic_*'],
    'FEAT_INTER_FILTERS': ['shiftformer', 'shiftmobilenet', 'elastic'],
    'EXCLUDE_JIT_FILTERS': ['*shiftformer*supernet', '*mobilenet*supernet', 'attentivenas*supernet', 'elastic_*'],
    'EXCLUDE_FX_FILTERS': ['*shiftformer*supernet', '*mobilenet*supernet', 'attentivenas*supernet', 'elastic_*'],
}
# This test prunes a model at every layer (timm's own CI skips it). The tiny models cover the same code.
SLOW = [
    f'test_prune_intermediate_layers_contract[{name}]'
    for name in ('shiftformer_supernet', 'shiftformer_small_supernet', 'shiftformer_base_supernet')]
UNUSED = [
    f'{test}{name}]' for test in ('test_model_backward[2-', 'test_prune_intermediate_layers_contract[')
    for name in ('ofa_mobilenetv3_supernet', 'ofa_mobilenetv3_w12_supernet', 'attentivenas_supernet',
                 'test_shiftmobilenet_supernet')]

LARGER = 'shiftformer_small_supernet', 'shiftformer_base_supernet', 'ofa_mobilenetv3_w12_supernet'  # same code
PARTS = 2  # processes of one thread; pytest-xdist does not end with these tests
PART_OF_TESTS = '''
import os

def pytest_collection_modifyitems(items):
    items[:] = items[int(os.environ['PART'])::int(os.environ['PARTS'])]
'''


def download(folder: Path) -> Path:
    """Download timm's tests/test_models.py from the source distribution of the installed version."""
    subprocess.run([
        sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:', '-d', str(folder),
        f'timm=={timm.__version__}'], check=True)
    archive, = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as files:
        source, = (member for member in files if member.name.endswith('/tests/test_models.py'))
        return _write(folder, files.extractfile(source).read().decode())


def adapt(source: str) -> str:
    """timm's test file with our names added to its lists."""
    for name, entries in ADDED.items():
        start = f'{name} = [\n'
        if source.count(start) != 1:
            raise SystemExit(f'{name} is not a list in the tests of timm {timm.__version__}; adapt ADDED in this file')
        source = source.replace(start, start + ''.join(f'    {entry!r},\n' for entry in entries))
    return source


def _write(folder: Path, text: str) -> Path:
    path = folder / 'test_models.py'
    path.write_text(text)
    return path


def main(arguments: list[str]) -> int:
    given = arguments[:1] if arguments and not arguments[0].startswith('-') else []
    names = [name for name in timm.list_models()
             if timm.model_entrypoint(name).__module__.startswith('timm_shiftnas') and name not in LARGER]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given[0]) if given else download(Path(folder))
        path = _write(Path(folder), adapt(path.read_text()))
        (path.parent / 'conftest.py').write_text(PART_OF_TESTS)
        command = [
            sys.executable, '-m', 'pytest', path.name, '-q', '-k', ' or '.join(names), '-p', 'no:cacheprovider',
            '-W', 'ignore', *(f'--deselect={path.name}::{test}' for test in SLOW + UNUSED), *arguments[len(given):]]
        environment = dict(os.environ, TORCH_BACKEND='timm_shiftnas', OMP_NUM_THREADS='1', PARTS=str(PARTS))
        parts = [subprocess.Popen(command, cwd=folder, env=dict(environment, PART=str(part))) for part in range(PARTS)]
        return max(part.wait() for part in parts)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
