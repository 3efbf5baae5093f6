"""The hook into unmodified training scripts: timm's own, and forks of it.

    python train.py --device-modules timm_shiftnas.patch --model shiftformer_tiny_supernet ...

is timm's script. Importing this module makes the `ClassificationTask` of a supernet a `StockTask`; other models train
as before. Settings are the fields of `ShiftNASConfig` and `RunConfig`, as variables or in a YAML file:

    SHIFTNAS_CONFIG=shiftnas.yaml SHIFTNAS_SHIFT=hypergradient SHIFTNAS_TOTAL_UPDATES=375000 python train.py ...

The script's checkpoints contain the state of the task, so that it can resume; `timm-shiftnas convert CHECKPOINT DIR`
turns one into a model directory. Your own loop needs no hook: use `timm_shiftnas.create_task`.

The hook replaces `TrainingTask.__new__`. It cannot replace the classes, because scripts import them before this module.
"""
from __future__ import annotations

import inspect
from typing import Any

import timm
from timm.task import ClassificationTask, TrainingTask

from .method.loop import StockTask, create_task, is_supernet
from .method.task import ShiftNASTask

__all__ = ['StockTask', 'create_task']

# Parameters, in the supported versions of timm, of all that the hook and its task rely on.
TIMM_SIGNATURES = {
    'ClassificationTask.__init__': 'self model criterion criterion_kwargs device dtype verbose',
    'ClassificationTask.forward': 'self input target',
    'ClassificationTask.prepare_distributed': 'self device_ids ddp_kwargs',
    'ClassificationTask.compile': 'self backend mode compile_kwargs',
    'TrainingTask.__init__': 'self device dtype verbose',
    'TrainingTask.get_trainable_module': 'self ema',
    'TrainingTask.get_eval_model': 'self module ema',
    'TrainingTask.setup_ema': 'self decay use_warmup device kwargs',
    'TrainingTask.update_ema': 'self step',
    'TrainingTask.get_task_state': 'self module ema',
    'TrainingTask.load_task_state': 'self state strict module ema',
    'TrainingTask.get_checkpoint_state': 'self ema unwrap_fn',
    'TrainingTask.load_checkpoint_state': 'self state_dict task_state ema strict',
    'TrainingTask.no_sync': 'self',
}


def _dispatch(cls: type[TrainingTask], *args: Any, **kwargs: Any) -> TrainingTask:
    """Replacement of `TrainingTask.__new__`: a supernet gets a `StockTask`."""
    model = args[0] if args else kwargs.get('model', kwargs.get('student_model'))
    if not is_supernet(model) or issubclass(cls, ShiftNASTask):
        return object.__new__(cls)
    if cls is ClassificationTask:
        return object.__new__(StockTask)
    raise ValueError(
        f'{cls.__name__} does not train supernets: leave out the flags that ask for it (distillation, multi-label), or '
        'derive your own task from timm_shiftnas.patch.StockTask; train.py of timm_shiftnas distils with --kd-model')


def _install() -> None:
    """Install the hook.

    Raises:
        ImportError: If this version of timm has other tasks than those in `TIMM_SIGNATURES`.
    """
    classes = dict(ClassificationTask=ClassificationTask, TrainingTask=TrainingTask)
    unknown = f'timm_shiftnas.patch does not know timm {timm.__version__}'
    hint = 'train with train.py of timm_shiftnas, or with timm 1.0.31'
    for name, known in TIMM_SIGNATURES.items():
        owner, _, method = name.partition('.')
        function = getattr(classes[owner], method, None)
        found = '' if function is None else ' '.join(inspect.signature(function).parameters)
        if found != known:
            raise ImportError(f'{unknown}: {name} takes ({found or "it is missing"}) and not ({known}); {hint}')
    if any(cls.__new__ is not object.__new__ and cls.__new__.__module__ != __name__ for cls in classes.values()):
        raise ImportError(f'{unknown}: its tasks already have a __new__; {hint}')
    TrainingTask.__new__ = staticmethod(_dispatch)  # type: ignore[method-assign, assignment]


_install()
