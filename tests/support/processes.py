"""Processes of their own, forked off one that has imported torch, timm and more: that takes seven seconds.

Nothing of ours is imported before a process begins.
"""
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([
    'torch', 'torch._dynamo', 'torchvision', 'timm', 'timm.data', 'timm.task', 'sklearn.datasets',
    'matplotlib.backends.backend_agg', 'matplotlib.figure'])


class Job:
    """A process that calls a function and exits with what it returns.

    Args:
        function: Of a module's top level.
        *args: Its arguments.
        out: File that gets what it prints.
        err: File, or terminal, that gets stderr; the same one if it is not given.
        environment: Variables to set.
    """

    def __init__(self, function, *args, out, err=None, environment=None):
        self.out, self.err = Path(out), Path(err or out)
        self.process = CONTEXT.Process(target=_run, args=(function, args, str(out), str(err or out), environment or {}))
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    @property
    def alive(self):
        return self.process.is_alive()

    def wait(self, timeout=120):
        """The exit code, and what went to stderr."""
        self.process.join(timeout)
        if self.alive:
            self.kill()
            raise TimeoutError(self.err.read_text())
        return self.process.exitcode, self.err.read_text()


def ranks(count, function, *args, folder, environment=None):
    """Jobs that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), **(environment or {}))
    return [Job(function, *args, out=Path(folder) / f'rank-{rank}.txt',
                environment=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(count)]


def call(function, *args, folder, environment=None):
    """Call a function in a process of its own: exit code, stdout and stderr."""
    out, err = Path(folder) / 'out.txt', Path(folder) / 'err.txt'
    code, text = Job(function, *args, out=out, err=err, environment=environment).wait()
    return code, out.read_text(), text


def run_code(code, *argv):
    """`python -c CODE ARGV`."""
    sys.argv = ['-c', *map(str, argv)]
    exec(code, {'__name__': '__main__'})


def run_file(path, *argv):
    """`python PATH ARGV`."""
    sys.argv = [str(path), *map(str, argv)]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name='__main__')


def run_module(name, *argv):
    """`python -m NAME ARGV`."""
    sys.argv = [name, *map(str, argv)]
    runpy.run_module(name, run_name='__main__', alter_sys=True)


def _run(function, args, out, err, environment):
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    multiprocessing.set_start_method(None, force=True)  # what it starts is started as anywhere
    sys.exit(function(*args))
