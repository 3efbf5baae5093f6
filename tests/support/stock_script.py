"""A stand-in for timm's training script, with its imports and calls in the same order and no code for supernets.

    python stock_script.py --device-modules timm_shiftnas.patch --model test_shiftformer_supernet ...

It trains on noise with a brighter square for one of two classes; no file is read.
"""
import argparse
import importlib
from contextlib import nullcontext
from functools import partial

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import (
    CheckpointSaver,
    NativeScaler,
    ParseKwargs,
    dispatch_clip_grad,
    distribute_bn,
    init_distributed_device,
    random_seed,
)

parser = argparse.ArgumentParser()
add = parser.add_argument
add('--device-modules', nargs='+', default=[])
add('--model', default='test_vit')
add('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
add('--epochs', type=int, default=1)
add('--batches', type=int, default=8)
add('-b', '--batch-size', type=int, default=16)
add('--grad-accum-steps', type=int, default=1)
add('--amp', action='store_true')
add('--amp-dtype', default='float16')
add('--mixup', type=float, default=0.)
add('--model-ema', action='store_true')
add('--torchcompile')
add('--resume', default='')
add('--output')
add('--seed', type=int, default=42)
add('--opt', default='sgd')
add('--kd-model', default='')
add('--multi-label', action='store_true')
add('--dump', help='folder in which each process saves the checkpoint state of its task')


def batch_of(args, epoch, number):
    """The part of this process of a batch over all processes, distributed as by samplers."""
    noise = torch.Generator().manual_seed(1000 * epoch + number)
    count = args.batch_size * args.world_size
    target = torch.randint(2, (count,), generator=noise)
    input = torch.randn(count, 3, 32, 32, generator=noise)
    input[:, :, 8:24, 8:24] += target[:, None, None, None] * 2.
    return input[args.rank::args.world_size], target[args.rank::args.world_size]


def main(argv=None):
    args = parser.parse_args(argv)
    for module in args.device_modules:
        importlib.import_module(module)
    args.device = 'cpu'
    device = init_distributed_device(args)
    random_seed(args.seed, args.rank)

    model = create_model(args.model, num_classes=2, img_size=32, **args.model_kwargs)
    model.to(device=device)
    mixup_fn = Mixup(mixup_alpha=args.mixup, num_classes=2) if args.mixup else None
    train_loss_fn = (SoftTargetCrossEntropy() if mixup_fn else LabelSmoothingCrossEntropy(0.1)).to(device=device)
    if args.kd_model:
        task = LogitDistillationTask(
            student_model=model, teacher_model=create_model(args.kd_model, num_classes=2, img_size=32),
            criterion=train_loss_fn, device=device, dtype=torch.float32, verbose=args.rank == 0)
    else:
        task_class = MultiLabelClassificationTask if args.multi_label else ClassificationTask
        task = task_class(
            model=model, criterion=train_loss_fn, device=device, dtype=torch.float32, verbose=args.rank == 0)
    model = task.get_trainable_module()
    eval_model = task.get_eval_model()
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=0.05, momentum=0.9)
    amp_autocast, loss_scaler = nullcontext, None
    if args.amp:
        amp_autocast = partial(torch.autocast, device_type='cpu', dtype=getattr(torch, args.amp_dtype))
        loss_scaler = NativeScaler(device='cpu') if args.amp_dtype == 'float16' else None

    start_epoch = 0
    if args.resume:
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer, loss_scaler=loss_scaler)
    if args.model_ema:
        task.setup_ema(decay=0.9, use_warmup=False, device=None)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=None)
        model, eval_model = task.get_trainable_module(), task.get_eval_model()
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=None)
    if args.distributed:
        task.prepare_distributed(device_ids=[device], broadcast_buffers=True)
        model = task.get_trainable_module()
    evaluator = task.create_evaluator(max_samples=args.batch_size * args.world_size)
    saver = None
    if args.rank == 0 and args.output:
        saver = CheckpointSaver(
            model=model, optimizer=optimizer, args=args, amp_scaler=loss_scaler, task=task, checkpoint_dir=args.output,
            recovery_dir=args.output, max_history=10)

    for epoch in range(start_epoch, args.epochs):
        task.get_trainable_module().train()
        optimizer.zero_grad()
        total = 0.
        for number in range(args.batches):
            input, target = batch_of(args, epoch, number)
            if mixup_fn:
                random_seed(number, args.rank)
                input, target = mixup_fn(input, target)
            last = (number + 1) % args.grad_accum_steps == 0 or number + 1 == args.batches
            left = args.batches % args.grad_accum_steps
            accum_steps = args.grad_accum_steps if number < args.batches - left else left
            with task.no_sync() if args.distributed and not last else nullcontext():
                with amp_autocast():
                    result = task(input, target)
                    loss = result['loss']
                if accum_steps > 1:
                    loss /= accum_steps
                if loss_scaler is not None:
                    loss_scaler(loss, optimizer, clip_grad=1., clip_mode='norm',
                                parameters=task.get_clip_parameters(), need_update=last)
                else:
                    loss.backward()
                    if last:
                        dispatch_clip_grad(task.get_clip_parameters(exclude_head=False), value=10., mode='norm')
                        optimizer.step()
            total += loss.item()
            if not last:
                continue
            optimizer.zero_grad()
            task.update_ema(step=epoch * args.batches + number)
            if saver is not None:
                saver.save_recovery(epoch, batch_idx=number)
        if args.distributed:
            distribute_bn(model, args.world_size, True)
        for model_to_validate in [eval_model, *([task.get_eval_model(ema=True)] if args.model_ema else [])]:
            evaluator.reset()
            model_to_validate.eval()
            with torch.inference_mode(), amp_autocast():
                input, target = batch_of(args, 99, 0)
                evaluator.update(model_to_validate(input), target)
            metrics = evaluator.compute(distributed=args.distributed)
        if args.rank == 0:
            print(f'epoch {epoch} loss {total:.4f} top1 {metrics["top1"]:.1f}', flush=True)
        if saver is not None:
            saver.save_checkpoint(epoch, metric=metrics['top1'])
    if args.dump:
        torch.save(task.get_checkpoint_state(), f'{args.dump}/rank-{args.rank}.pt')
    if args.distributed:
        torch.distributed.destroy_process_group()
    print(f'{type(task).__name__} rank {args.rank} done', flush=True)


if __name__ == '__main__':
    main()
