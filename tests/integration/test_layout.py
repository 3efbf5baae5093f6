"""The package's modules import in one direction only (read from the source, nothing is run)."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'timm_shiftnas'
ORDER = ['utils', 'space', ('method', 'layers'), 'models', 'data', 'evaluation', 'hub', 'training', 'cli']
RANK = {name: rank for rank, names in enumerate(ORDER) for name in ([names] if isinstance(names, str) else names)}
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
    assert own(imported(PACKAGE / 'space' / 'complexity.py')) == {'space'}
    assert {'space', 'layers'} <= own(imported(PACKAGE / 'models' / 'shiftformer.py'))
    assert 'timm.models.build_model_with_cfg' in imported(PACKAGE / 'models' / 'shiftformer.py')


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_the_left(path):
    if module(path) in RANK:
        wrong = {name for name in own(imported(path)) & set(RANK)
                 if name != module(path) and RANK[name] >= RANK[module(path)]}
        assert not wrong, f'{path.relative_to(PACKAGE)} imports {sorted(wrong)}, which are not left of it'


def test_every_package_has_its_place():
    packages = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
    assert packages == set(RANK)
    assert len(list(PACKAGE.glob('*.py'))) <= 6


@pytest.mark.parametrize('package', sorted(RANK))
def test_no_cycles_inside_a_package(package):
    """A folder in it counts as one module, and its modules must not form a cycle either."""
    for folder in [PACKAGE / package, *(path.parent for path in (PACKAGE / package).glob('*/__init__.py'))]:
        prefix = f'timm_shiftnas.{".".join(folder.relative_to(PACKAGE).parts)}.'
        graph: dict[str, set[str]] = {}
        for path in folder.rglob('*.py'):
            own_name = path.relative_to(folder).parts[0].removesuffix('.py')
            if own_name != '__init__':
                names = {name.removeprefix(prefix).split('.')[0] for name in imported(path) if name.startswith(prefix)}
                found = {name for name in names if (folder / name).is_dir() or (folder / f'{name}.py').exists()}
                graph[own_name] = graph.get(own_name, set()) | found - {own_name}
        assert len(graph) > 1 and any(graph.values())
        list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_patch_imports_the_method_alone():
    assert own(imported(PACKAGE / 'patch.py')) == {'method'}


def test_only_tasks_and_the_patch_import_timm_task():
    importers = {
        str(path.relative_to(PACKAGE)) for path in FILES
        if any(name.startswith('timm.task') for name in imported(path))}
    assert importers == {'method/task.py', 'method/distillation.py', 'patch.py'}
