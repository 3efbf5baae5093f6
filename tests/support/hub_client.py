"""huggingface_hub's real client in its own process: it reads `HF_ENDPOINT` and other variables when it is imported."""
import os
import sys
import time
from contextlib import contextmanager

import pytest

from .processes import CONTEXT


class Client:
    """A process that runs code against a Hub, with its own cache. Call it with the code and the values it uses."""

    def __init__(self, hub, home, **environment):
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, {
            'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1', **environment}))
        self.process.start()
        theirs.close()

    def __call__(self, code, **names):
        """The value that the code gives to the name `result`."""
        self.send(code, **names)
        return self.receive()

    def send(self, code, **names):
        self.connection.send((code, names))

    def receive(self):
        answer = self.connection.recv()
        if isinstance(answer, Remote):
            raise answer
        return answer

    def close(self):
        self.connection.close()
        self.process.join()


class Remote(Exception):
    """An error in the process of a client: names of its class and base classes, and its message."""

    def __init__(self, classes, message):
        super().__init__(classes, message)
        self.classes, self.message = classes, message


@contextmanager
def fails(error_class, *named):
    """Expect an error of a class, in the process of a client, whose message holds some values."""
    with pytest.raises(Remote) as info:
        yield info
    error = info.value
    assert error_class in error.classes, error
    missing = [value for value in named if value not in error.message]
    assert not missing, (missing, error.message)


def _serve(connection, environment):
    os.environ.update(environment)
    full, waits = time.sleep, []

    def sleep(seconds):  # between tries, of huggingface_hub and of ours
        waits.append(seconds)
        full(min(seconds, .02))

    time.sleep = sleep
    # imported again, with these variables: the server of processes has imported them before
    for name in list(sys.modules):
        if name.partition('.')[0] in ('timm', 'huggingface_hub'):
            del sys.modules[name]
    import timm
    import torch

    import timm_shiftnas as tsn

    from .pictures import without_matplotlib
    names = dict(timm=timm, torch=torch, tsn=tsn, os=os, waits=waits, without_matplotlib=without_matplotlib)
    while True:
        try:
            code, given = connection.recv()
        except EOFError:
            return
        names.update(given, result=None)
        try:
            exec(code, names)
            answer = names['result']
        except BaseException as error:
            answer = Remote([cls.__name__ for cls in type(error).__mro__], str(error))
        connection.send(answer)
