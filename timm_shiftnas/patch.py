"""ShiftNAS in training loops that know nothing of it: timm's own script, forks of it, loops of one's own.

    python train.py --device-modules timm_shiftnas.patch --model shiftformer_tiny_supernet ...

is timm's script, unmodified. Importing this module makes the `ClassificationTask` of a supernet a `StockTask`; what
timm does with every other model stays as it is. Settings come from the environment or from a YAML file, under the names
of `ShiftNASConfig` and `Settings`:

    SHIFTNAS_CONFIG=shiftnas.yaml SHIFTNAS_SHIFT=hypergradient SHIFTNAS_TOTAL_UPDATES=375000 python train.py ...

A script saves its checkpoints with the state of the task, and resumes with it; `timm-shiftnas convert CHECKPOINT DIR`
makes a model directory of one. In a loop of one's own, `create_task` does without the environment.

The one module that changes something in timm. It does so in `TrainingTask.__new__`, because scripts import the names of
classes before they import this module: only the classes themselves can still be told.
"""
from __future__ import annotations

import inspect
from typing import Any

import timm
from timm.task import ClassificationTask, TrainingTask

from .method.loop import Settings, StockTask, create_task
from .method.task import ShiftNASTask
from .space import is_supernet

__all__ = ['Settings', 'StockTask', 'create_task']

# of what this module relies on, the parameters in the versions of timm that it knows
KNOWN = {
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
    """In the place of `TrainingTask.__new__`: the task of a supernet is ours."""
    model = args[0] if args else kwargs.get('model', kwargs.get('student_model'))
    if not is_supernet(model) or issubclass(cls, ShiftNASTask):
        return object.__new__(cls)
    if cls is ClassificationTask:
        return object.__new__(StockTask)
    raise ValueError(
        f'{cls.__name__} does not train supernets: leave out the flags that ask for it (distillation, multi-label), or '
        'derive your own task from timm_shiftnas.patch.StockTask; train.py of timm_shiftnas distils by --kd-model')


def _install() -> None:
    """Tell timm, if it is one that this module knows.

    Raises:
        ImportError: If it is not.
    """
    classes = dict(ClassificationTask=ClassificationTask, TrainingTask=TrainingTask)
    for name, known in KNOWN.items():
        owner, _, method = name.partition('.')
        function = getattr(classes[owner], method, None)
        found = '' if function is None else ' '.join(inspect.signature(function).parameters)
        if found != known:
            raise ImportError(
                f'timm_shiftnas.patch does not know timm {timm.__version__}: {name} takes ({found or "it is gone"}) '
                f'and not ({known}); train with train.py of timm_shiftnas, or with timm 1.0.31')
    if any(cls.__new__ is not object.__new__ and cls.__new__.__module__ != __name__ for cls in classes.values()):
        raise ImportError(
            f'timm_shiftnas.patch does not know timm {timm.__version__}, whose tasks have a __new__ already; train '
            'with train.py of timm_shiftnas, or with timm 1.0.31')
    TrainingTask.__new__ = staticmethod(_dispatch)


_install()
