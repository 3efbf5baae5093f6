"""The package's modules import in one direction only (read from the source, nothing is run)."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_shiftnas'
ORDER = [
    'distributed', 'space', 'stages', 'complexity', 'masks', 'layers', 'models', 'calibration', 'sampling', 'generator',
    'task', 'patch', 'evaluation', 'loading', 'checkpoints', 'hub', 'flags', 'cli',
]
FILES = sorted(PACKAGE.rglob('*.py'))


def imported(path: Path) -> set[str]:
    """Full names of everything that a file of the package imports, at any depth of its code."""
    package = ['timm_shiftnas', *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package[:len(package) - node.level + 1] if node.level else []
            parent = '.'.join([*parent, *([node.module] if node.module else [])])
            names |= {f'{parent}.{alias.name}' for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    """Modules (or subpackages) directly under `timm_shiftnas` among imported names."""
    return {name.split('.')[1] for name in names if name.startswith('timm_shiftnas.')}


def module(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def test_imports_are_read():
    assert own(imported(PACKAGE / 'complexity.py')) == {'space', 'stages'}
    assert {'space', 'complexity', 'layers', 'masks'} <= own(imported(PACKAGE / 'models' / 'shiftformer.py'))
    assert 'timm.models.build_model_with_cfg' in imported(PACKAGE / 'models' / 'shiftformer.py')


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_the_left(path):
    if module(path) in ORDER:
        allowed = ORDER[:ORDER.index(module(path)) + 1]
        wrong = (own(imported(path)) & set(ORDER)) - set(allowed)
        assert not wrong, f'{path.name} imports {sorted(wrong)}, which come after it'


def test_no_cycles():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if module(path) not in ('__init__', '__main__'):
            graph.setdefault(module(path), set()).update(own(imported(path)) - {module(path)})
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_arithmetic_and_sampling_know_no_model():
    for path in [PACKAGE / 'space.py', PACKAGE / 'complexity.py', *(PACKAGE / 'sampling').glob('*.py')]:
        assert 'models' not in own(imported(path)), path


def test_only_the_task_and_the_patch_import_timm_task():
    importers = {
        path.name for path in [*FILES, ROOT / 'train.py']
        if any(name.startswith('timm.task') for name in imported(path))}
    assert importers == {'task.py', 'patch.py'}
