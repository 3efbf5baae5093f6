"""The Hub: huggingface_hub's real client, in a process of its own, against a small Hub on this machine.

`HF_ENDPOINT` is read when the client is imported: one process runs what the tests send it, line by line.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from support.hub_server import Fault, Hub

import timm_shiftnas as tsn
from timm_shiftnas.hub.card import model_card
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.push import published_files
from timm_shiftnas.models import bn_statistics

ROOT = Path(__file__).parents[2]
BUDGET = 3_276_000.  # of a group, less what rounding may take
CLIENT = '''
import contextlib, io, json, os, sys, time
full = time.sleep
time.sleep = lambda seconds: full(min(seconds, .1))  # before another try, of huggingface_hub and of ours
answers = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
import timm, torch
import timm_shiftnas as tsn
from timm_shiftnas_cli import main as cli
names = dict(timm=timm, torch=torch, tsn=tsn, cli=cli, io=io, contextlib=contextlib, os=os)
for line in sys.stdin:
    try:
        names['result'] = None
        exec(json.loads(line), names)
        answer = dict(result=names['result'])
    except BaseException as error:
        classes = [f'{cls.__module__}.{cls.__name__}' for cls in type(error).__mro__]
        answer = dict(error=type(error).__name__, classes=classes, message=str(error))
    print(json.dumps(answer), file=answers, flush=True)
'''


class Client:
    """A process that talks to a Hub with a cache of its own."""

    def __init__(self, hub, home, **environment):
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={
                **os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
                'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', **environment})

    def __call__(self, code, **names):
        self.send(code, **names)
        return self.receive()

    def send(self, code, **names):
        given = ''.join(f'{name} = {value!r}\n' for name, value in names.items())
        self.process.stdin.write(json.dumps(given + code) + '\n')
        self.process.stdin.flush()

    def receive(self):
        answer = json.loads(self.process.stdout.readline())
        if 'error' in answer:
            raise Remote(answer)
        return answer['result']

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Remote(Exception):
    def __init__(self, answer):
        super().__init__(f'{answer["error"]}: {answer["message"]}')
        self.name, self.classes, self.message = answer['error'], answer['classes'], answer['message']


@pytest.fixture(scope='module')
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    process = Client(hub, tmp_path_factory.mktemp('home'), HF_TOKEN='writer')
    yield process
    process.close()


@pytest.fixture(scope='module', autouse=True)
def without_network(tmp_path_factory):
    """A client whose Hub is gone. huggingface_hub tries for half a minute, meanwhile the other tests run."""
    home = tmp_path_factory.mktemp('home')
    with Hub() as gone:
        pass  # its port is closed again
    process = Client(gone, home)
    process.send(LOAD, repo='org/tiny', cache=str(home / 'cache'), budget=BUDGET, options={})
    yield process
    process.process.kill()  # it may still be trying, where other tests were selected
    process.close()


@pytest.fixture(autouse=True)
def quiet(hub):
    hub.requests.clear()
    yield
    hub.faults.clear()  # before the next test's fixtures


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = timm.create_model('test_shiftmobilenet_supernet', num_classes=10).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(.05 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope='module')
def generator(net):
    return tsn.ArchitectureGenerator(net.space).fit(steps=20, progress=False)


@pytest.fixture(scope='module')
def directory(tmp_path_factory, net, generator):
    """As train.py leaves it: pictures beside the model."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    low, high = net.macs(net.space.smallest), net.macs(net.space.largest)
    edges = [low, (low + BUDGET) / 2, BUDGET, high]
    archs = generator.propose_many(edges[1:])
    rows = [dict(name=f'group {k + 1}', budget=edges[k + 1], macs=net.macs(arch), params=net.params(arch),
                 top1=60. + k, top5=90. + k, arch=arch.to_dict()) for k, arch in enumerate(archs)]
    stats = {arch: bn_statistics(tsn.calibrate_bn(
        tsn.extract(net, arch), [torch.randn(8, 3, 32, 32)])) for arch in archs}
    tsn.save_pretrained(
        folder / 'model', net, generator, groups=edges, probabilities=[.2, .3, .5], results=rows, bn_stats=stats,
        training=dict(dataset='sklearn/digits', command='python train.py --epochs 3', versions=dict(timm='1.0.31')))
    (folder / 'shift.png').write_bytes(b'\x89PNG\r\n a picture of the shift')
    (folder / 'summary.csv').write_text('epoch\n')
    return folder


PUSH = 'result = tsn.push_directory(directory, repo, **options)'
LOAD = '''
net = tsn.from_pretrained(repo, flops=budget, cache_dir=cache, **options)
result = [net.arch.to_dict(), float(sum(p.double().sum() for p in net.state_dict().values()))]
'''


def push(client, directory, repo, **options):
    return client(PUSH, directory=str(directory), repo=repo, options=options)


def load(client, repo, cache, **options):
    return client(LOAD, repo=repo, cache=str(cache), budget=BUDGET, options=options)


def logged_load(client, repo, cache, **options):
    """`load`, and what was logged."""
    return client(f'''
import logging
stream = io.StringIO()
handler = logging.StreamHandler(stream)
logging.getLogger('timm_shiftnas').addHandler(handler)
try:{LOAD.replace(chr(10), chr(10) + '    ')}
finally:
    logging.getLogger('timm_shiftnas').removeHandler(handler)
result = [result, stream.getvalue()]
''', repo=repo, cache=str(cache), budget=BUDGET, options=options)


def files_of(hub, name, branch='main'):
    repo = hub.repos[name]
    return repo.commits[repo.branches[branch]]


@pytest.fixture(scope='module')
def published(client, directory):
    push(client, directory, 'org/tiny', license='mit')
    return 'org/tiny'


def expected(directory):
    net = tsn.from_pretrained(directory / 'model', flops=BUDGET)
    return [net.arch.to_dict(), float(sum(p.double().sum() for p in net.state_dict().values()))]


# -- pushing -----------------------------------------------------------------------------------------------------------


def test_one_commit_with_everything(hub, client, directory):
    address = push(client, directory, 'org/everything', private=True)
    repo = hub.repos['org/everything']
    assert repo.private and len(repo.commits) == 2
    assert address == f'{hub.url}/org/everything/commit/{repo.branches["main"]}'
    files = repo.commits[repo.branches['main']]
    assert set(files) == {
        '.gitattributes', 'config.json', 'model.safetensors', 'generator.safetensors', 'bn_stats.safetensors',
        'README.md', 'budgets.csv', 'accuracy.png', 'shift.png'}
    for name in ('config.json', 'model.safetensors', 'generator.safetensors', 'bn_stats.safetensors'):
        assert files[name] == (directory / 'model' / name).read_bytes()
    assert files['shift.png'] == (directory / 'shift.png').read_bytes()
    assert sum(' /api/models/org/everything/commit' in line for line in hub.requests) == 1
    # a second push of the same makes no commit; a changed one makes one, and takes away what is gone
    push(client, directory, 'org/everything')
    assert len(repo.commits) == 2


def test_an_update_takes_away_what_is_gone(hub, client, net, generator, tmp_path):
    tsn.save_pretrained(tmp_path, net, generator)
    push(client, tmp_path, 'org/update')
    with pytest.raises(Remote, match='org/update is public already'):
        push(client, tmp_path, 'org/update', private=True)
    first = hub.repos['org/update'].branches['main']
    tsn.save_pretrained(tmp_path, net)
    push(client, tmp_path, 'org/update')
    files = hub.repos['org/update'].commits[hub.repos['org/update'].branches['main']]
    assert 'generator.safetensors' not in files and len(hub.repos['org/update'].commits) == 3
    # the old commit still loads, by its name
    with pytest.raises(Remote, match='saved without a generator'):
        load(client, 'org/update', tmp_path / 'cache')
    arch = net.space.smallest.to_dict()
    client('tsn.from_pretrained("org/update", arch=arch, cache_dir=cache)', arch=arch, cache=str(tmp_path / 'cache'))
    assert load(client, 'org/update', tmp_path / 'cache', revision=first)


def test_push_to_hub_of_objects_and_pull_requests(hub, client):
    client('''
net = timm.create_model('test_shiftmobilenet_supernet', num_classes=4)
generator = tsn.ArchitectureGenerator(net.space)
tsn.push_to_hub('org/objects', net, generator, commit_message='a message')
''')
    address = client('result = tsn.push_to_hub("org/objects", tsn.extract(net, net.space.smallest), create_pr=True)')
    assert address == f'{hub.url}/org/objects/discussions/1'
    repo = hub.repos['org/objects']
    assert 'generator.safetensors' in repo.commits[repo.branches['main']]
    assert 'generator.safetensors' not in repo.commits[repo.branches['refs/pr/1']]
    client('tsn.from_pretrained("org/objects", revision="refs/pr/1")')


def test_a_wrapped_network_is_pushed_as_the_plain_one(hub, client, tmp_path):
    """By DDP, as in a training on several GPUs, by EMA, and by both."""
    results = client('''
from timm.utils import ModelEmaV3
torch.manual_seed(0)
net = timm.create_model('test_shiftformer_supernet', num_classes=4)
torch.distributed.init_process_group('gloo', init_method='file://' + store, rank=0, world_size=1)
try:
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    wrapped = dict(plain=net, ddp=ddp, ema=ModelEmaV3(net), both=ModelEmaV3(ddp))
    for name, wrapper in wrapped.items():
        tsn.push_to_hub('org/' + name, wrapper)
finally:
    torch.distributed.destroy_process_group()
x, arch = torch.randn(2, 3, 32, 32), net.space.sample(torch.Generator().manual_seed(0))
result = [tsn.from_pretrained('org/' + name, arch=arch)(x[:, :net.in_chans]).tolist() for name in wrapped]
''', store=str(tmp_path / 'store'))
    assert all(result == results[0] for result in results)
    plain = files_of(hub, 'org/plain')['model.safetensors']
    assert not any(key.startswith('module.') for key in safetensors.torch.load(plain))
    for name in ('org/ddp', 'org/ema', 'org/both'):
        assert files_of(hub, name)['model.safetensors'] == plain


def test_a_branch_that_does_not_exist_is_made(hub, client, directory, net, tmp_path):
    push(client, directory, 'org/branches', revision='next')  # nor does the repository
    repo = hub.repos['org/branches']
    assert set(files_of(hub, 'org/branches')) == {'.gitattributes'} and len(repo.commits) == 2
    assert load(client, 'org/branches', tmp_path / 'cache', revision='next') == expected(directory)
    # a second one starts from main; a name with a slash
    push(client, directory, 'org/branches')
    tsn.save_pretrained(tmp_path / 'plain', net)
    push(client, tmp_path / 'plain', 'org/branches', revision='try/this')
    files = files_of(hub, 'org/branches', 'try/this')
    assert 'model.safetensors' in files and not {'generator.safetensors', 'shift.png'} & set(files)
    assert 'generator.safetensors' in files_of(hub, 'org/branches')
    before = dict(repo.branches)
    for options, message in (
            (dict(revision=repo.branches['main']), 'is a commit, to which nothing can be pushed; give a branch'),
            (dict(revision='next', create_pr=True), "a pull request is to 'main'"),
            (dict(revision='refs/pr/7'), 'check revision=: a branch, or refs/pr/N.*org/branches.*no commit was made'),
            (dict(revision='by-a-reader', token='reader'), 'may not do this.*\norg/branches.*no commit was made')):
        with pytest.raises(Remote, match='(?s)' + message):
            push(client, directory, 'org/branches', **options)
    assert repo.branches == before


def test_the_command_line(hub, client, directory, tmp_path):
    out = client('''
stream = io.StringIO()
with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
    codes = [cli(['push', directory, 'org/cli', '--private']),
             cli(['extract', directory + '/model', '--flops', budget, '--output', out, '--push', 'org/cli-sub']),
             cli(['push', directory, 'not a repo']), cli(['push', out + '/nowhere', 'org/cli'])]
result = [codes, stream.getvalue()]
''', directory=str(directory), out=str(tmp_path / 'out'), budget=str(BUDGET))
    codes, text = out
    with pytest.raises(Remote, match='not published: .* holds no BatchNorm statistics .* give --data-dir'):
        client("from timm_shiftnas.cli import run_extract\nfrom timm_shiftnas_cli import build_parser\n"
               "run_extract(build_parser().parse_args(['extract', directory + '/model', '--flops', '2M', '--output', "
               "out, '--overwrite', '--push', 'org/cli-none']))",
               directory=str(directory), out=str(tmp_path / 'none'))
    assert codes == [0, 0, 2, 2], text
    assert f'{hub.url}/org/cli/commit/' in text and f'{hub.url}/org/cli-sub/commit/' in text
    assert 'not a repo' in text and 'is not a directory' in text
    assert hub.repos['org/cli'].private
    files = hub.repos['org/cli-sub'].commits[hub.repos['org/cli-sub'].branches['main']]
    assert json.loads(files['config.json'])['timm_shiftnas']['kind'] == 'subnet'
    # the pushed subnet loads by our call and by timm's
    same = client('''
a = tsn.from_pretrained('org/cli-sub')
b = timm.create_model('hf-hub:org/cli-sub', pretrained=True).eval()
x = torch.randn(2, 3, a.arch.resolution, a.arch.resolution)
result = torch.equal(a(x), b(x))
''')
    assert same


def test_train_publishes(hub, client, tmp_path):
    flags = ['--dataset', 'sklearn/digits', '--model', 'test_shiftformer_supernet', '-j', '0', '-b', '256', '--epochs',
             '1', '--num-groups', '2', '--generator-fit-steps', '5', '--output', str(tmp_path), '--hub-private']
    code = client('''
import sys
sys.path.insert(0, root)
from timm_shiftnas.training import trainer as train
result = [train.main([*flags, '--experiment', 'a', '--push-to-hub', 'org/trained'])]
''', flags=flags, root=str(ROOT))
    assert code == [0]
    repo = hub.repos['org/trained']
    files = repo.commits[repo.branches['main']]
    assert repo.private and {'shift.png', 'accuracy.png', 'budgets.csv', 'model.safetensors'} <= set(files)
    card = files['README.md'].decode()
    assert '--model test_shiftformer_supernet' in card and 'sklearn/digits' in card and str(tmp_path) not in card
    # what is not published is still there
    hub.faults.append(Fault('POST .*/commit/main', '403', times=9))
    code = client('''
result = train.main([*flags, '--seed', '7', '--experiment', 'b', '--push-to-hub', 'org/trained'])
''')
    assert code == 2 and (tmp_path / 'b' / 'model' / 'config.json').exists()


def test_what_is_not_ours_stays(hub, client, directory, net, tmp_path):
    client('''
from huggingface_hub import HfApi
api, card = HfApi(), b'---\\nlicense: mit\\n---\\n# By hand'
api.create_repo('org/mine')
for name, content in (('README.md', card), ('shift.png', b'mine'), ('notes.txt', b'mine')):
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id='org/mine')
''')
    tsn.save_pretrained(tmp_path, net)
    push(client, tmp_path, 'org/mine')
    repo = hub.repos['org/mine']
    files = repo.commits[repo.branches['main']]
    assert files['README.md'].endswith(b'# By hand') and files['shift.png'] == files['notes.txt'] == b'mine'
    assert 'model.safetensors' in files
    # nor does a picture that lies beside the directory by chance go up
    (tmp_path / 'model').mkdir()
    tsn.save_pretrained(tmp_path / 'model', net)
    (tmp_path / 'shift.png').write_bytes(b'secret')
    push(client, tmp_path / 'model', 'org/chance')
    assert 'shift.png' not in hub.repos['org/chance'].commits[hub.repos['org/chance'].branches['main']]


def test_nothing_but_tensors_is_pushed(hub, client, net, tmp_path):
    import pickle
    for name, message in (
            ('pytorch_model.bin', 'timm_shiftnas.files'), ('model.safetensors', 'not a safetensors file')):
        folder = tmp_path / name
        tsn.save_pretrained(folder, net)
        data = pickle.dumps(dict(a=1))
        (folder / name).write_bytes(data)
        config = json.loads((folder / 'config.json').read_text())
        config['timm_shiftnas']['files'][name] = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        (folder / 'config.json').write_text(json.dumps(config))
        with pytest.raises(Remote, match=message):
            push(client, folder, 'org/pickle')
    assert 'org/pickle' not in hub.repos


def test_a_broken_directory_is_not_pushed(hub, client, directory, tmp_path):
    import shutil
    copy = shutil.copytree(directory / 'model', tmp_path / 'model')
    data = bytearray((copy / 'model.safetensors').read_bytes())
    data[-1] ^= 1
    (copy / 'model.safetensors').write_bytes(bytes(data))
    with pytest.raises(Remote, match='its sha256 differs'):
        push(client, copy, 'org/broken')
    assert 'org/broken' not in hub.repos and not hub.requests


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card(hub, client, directory, published):
    text = hub.repos[published].commits[hub.repos[published].branches['main']]['README.md'].decode()
    _, front, body = text.split('---\n', 2)
    metadata = yaml.safe_load(front)
    assert metadata['library_name'] == 'timm' and metadata['pipeline_tag'] == 'image-classification'
    assert {'timm', 'timm_shiftnas'} <= set(metadata['tags']) and metadata['license'] == 'mit'
    metrics = [metric for result in metadata['model-index'][0]['results'] for metric in result['metrics']]
    assert [metric['value'] for metric in metrics] == [60., 61., 62.]
    rows = SavedModel(directory / 'model').info['results']
    for row in rows:
        assert f'| {row["name"]} |' in body and f'| {row["top1"]:.2f} |' in body
    assert '![top-1 against MACs](accuracy.png)' in body and '](shift.png)' in body
    assert "tsn.from_pretrained" in body or f"from_pretrained('{published}', flops=" in body
    assert 'python train.py --epochs 3' in body and 'timm 1.0.31' in body and '@inproceedings{zhang2023shiftnas' in body
    assert str(model_card(SavedModel(directory / 'model'), published, ['accuracy.png', 'shift.png'], 'mit')) == text


def test_the_card_is_readable(directory, net, tmp_path):
    """Numbers of a column end below each other; a long command is broken between flags; one subnet has no curve."""
    values = dict(budget=3_970_000., macs=999_960, params=146_000, top1=60., top5=100., arch={})
    flags = [f'--flag-{k} {k} {"value" * (k % 4 + 1)}' for k in range(12)]
    training = dict(dataset='image folder', command=f'python train.py {" ".join(flags)}')
    tsn.save_pretrained(
        tmp_path / 'net', net, results=[dict(values, name='group 1'), dict(values, name='a|b', params=17)],
        training=training)
    card = str(model_card(SavedModel(tmp_path / 'net'), 'org/card'))
    assert '| ---: |\n| group 1 | 3.970M | 1000k | 146.0k | 60.00 | 100.00 |\n' in card
    assert '| a/b | 3.970M | 1000k | 17 |' in card and 'on the validation images (image folder).' in card
    command = card.partition('## Training\n\n```\n')[2].partition('\n```')[0]
    assert ' '.join(command.replace('\\\n', '').split()) == training['command']
    assert all(flag in command for flag in flags) and max(map(len, command.splitlines())) < 100
    subnet = tsn.extract(net, net.space.smallest)
    tsn.save_pretrained(tmp_path / 'subnet', subnet, results=[dict(values, name='smallest')])
    saved = SavedModel(tmp_path / 'subnet')
    files = published_files(saved, 'org/card', None, None)
    assert 'accuracy.png' not in files and 'budgets.csv' in files
    assert '## Accuracy' in files['README.md'].decode() and '.png' not in files['README.md'].decode()


# -- loading -----------------------------------------------------------------------------------------------------------


def test_load_by_budget(hub, client, directory, published, tmp_path):
    result = load(client, published, tmp_path)
    assert result == expected(directory)
    # each file once, all of one commit
    gets = [line for line in hub.requests if line.startswith('GET')]
    sha = hub.repos[published].branches['main']
    names = ['config.json', 'model.safetensors', 'generator.safetensors', 'bn_stats.safetensors']
    assert sorted(line.rpartition('/')[2] for line in gets) == sorted(names)
    assert sum(f'/resolve/{sha}/' in line for line in gets) >= 3
    assert len(hub.requests) == 2 * len(gets)  # and is asked for once
    hub.requests.clear()
    assert load(client, published, tmp_path) == result
    assert hub.requests == [f'HEAD /{published}/resolve/main/config.json']


def test_the_supernet_through_timm(client, directory, published, net):
    total = client('''
net = timm.create_model('hf-hub:org/tiny', pretrained=True)
result = [float(sum(p.double().sum() for p in net.parameters())), net.space.size, net.num_classes]
''')
    saved = safetensors.torch.load_file(directory / 'model' / 'model.safetensors')
    own = sum(saved[name].double().sum() for name, _ in net.named_parameters())
    assert total[0] == pytest.approx(float(own)) and total[1:] == [net.space.size, 10]


def test_offline_from_the_cache(hub, client, directory, published, tmp_path):
    result = load(client, published, tmp_path / 'a')
    hub.requests.clear()
    assert load(client, published, tmp_path / 'a', local_files_only=True) == result
    assert not hub.requests
    with pytest.raises(Remote, match='not in the cache') as error:
        load(client, published, tmp_path / 'b', local_files_only=True)
    assert error.value.name == 'LocalEntryNotFoundError'


def test_offline_mode_and_a_client_with_xet(directory, tmp_path):
    with Hub(lfs=False) as hub:
        client = Client(hub, tmp_path / 'home', HF_TOKEN='writer', HF_HUB_DISABLE_XET='0')
        push(client, directory, 'org/tiny')
        result = load(client, 'org/tiny', tmp_path / 'cache')
        client.close()
    assert result == expected(directory)
    client = Client(hub, tmp_path / 'home', HF_HUB_OFFLINE='1')  # the Hub is gone
    assert load(client, 'org/tiny', tmp_path / 'cache') == result
    with pytest.raises(Remote, match='not in the cache: connect to the network'):
        load(client, 'org/tiny', tmp_path / 'other')
    client.close()


def test_private_repositories_and_tokens(hub, client, directory, tmp_path):
    push(client, directory, 'org/secret', private=True)
    assert load(client, 'org/secret', tmp_path / 'a', token='reader') == expected(directory)
    cases = (
        ('org/secret', dict(token=False), 'RepositoryNotFoundError', 'give token= or log in'),
        ('org/missing', {}, 'RepositoryNotFoundError', 'check the name'),
        ('org/secret', dict(token='expired'), 'HfHubHTTPError', 'wrong or has expired'),
        ('org/secret', dict(revision='nowhere'), 'RevisionNotFoundError', 'check revision='),
    )
    for repo, options, name, hint in cases:
        with pytest.raises(Remote, match=hint) as error:
            load(client, repo, tmp_path / 'b', **options)
        assert any(cls.endswith(name) for cls in error.value.classes), error.value
    # a name that is taken, unseen by this token, is not told as a new repository
    with pytest.raises(Remote, match='(?s)check the name.*org/secret: it is as it was: no commit was made$'):
        push(client, directory, 'org/secret', token='stranger')
    with pytest.raises(Remote, match='may not do this|may not') as error:
        push(client, directory, 'org/secret', token='reader')
    assert any(cls.endswith('HfHubHTTPError') for cls in error.value.classes)


def test_a_gated_repository(hub, client, directory, tmp_path):
    push(client, directory, 'org/gated')
    hub.repos['org/gated'].gated = True
    for token in ('reader', False):
        with pytest.raises(Remote, match='ask for access on the page of the repository') as error:
            load(client, 'org/gated', tmp_path, token=token)
        assert error.value.name == 'GatedRepoError'
    assert load(client, 'org/gated', tmp_path) == expected(directory)


def test_an_expired_token(hub, client, directory, tmp_path):
    """What is in the cache can still be loaded; for a branch it is said that it may not be the newest."""
    push(client, directory, 'org/expires', private=True)
    sha = hub.repos['org/expires'].branches['main']
    hub.tokens['old'] = False
    result, log = logged_load(client, 'org/expires', tmp_path / 'cache', token='old')
    assert result == expected(directory) and not log
    del hub.tokens['old']
    again, log = logged_load(client, 'org/expires', tmp_path / 'cache', token='old')
    assert again == result and sha in log and 'the token is wrong or has expired: log in again' in log
    hub.requests.clear()
    assert logged_load(client, 'org/expires', tmp_path / 'cache', token='old', revision=sha) == [result, '']
    assert not hub.requests
    with pytest.raises(Remote, match='the token is wrong or has expired: log in again'):
        load(client, 'org/expires', tmp_path / 'other', token='old', revision=sha)
    with pytest.raises(Remote, match='(?s)the token is wrong or has expired.*org/expires: .*no commit was made'):
        push(client, directory, 'org/expires', token='old')


# -- faults on loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pattern,kind', [
    ('GET .*/model.safetensors', '500'), ('GET .*/model.safetensors', 'cut'), ('GET .*/config.json', '503'),
    ('HEAD .*/config.json', '500'), ('GET .*/generator.safetensors', 'lost'),
])
def test_a_passing_fault_is_tried_again(hub, client, directory, published, tmp_path, pattern, kind):
    hub.faults.append(Fault(pattern, kind))
    assert load(client, published, tmp_path) == expected(directory)
    assert hub.faults[0].times == 0


def test_a_lasting_fault(hub, client, published, tmp_path):
    hub.faults.append(Fault('GET .*/model.safetensors', '500', times=100))
    with pytest.raises(Remote, match='the Hub has a fault') as error:
        load(client, published, tmp_path)
    assert any(cls.endswith('HfHubHTTPError') for cls in error.value.classes)


@pytest.mark.parametrize('name', ['model.safetensors', 'bn_stats.safetensors', 'generator.safetensors'])
def test_a_flipped_bit(hub, client, directory, published, tmp_path, name):
    hub.faults.append(Fault(f'GET .*/{name}', 'flip'))
    with pytest.raises(Remote, match=f'{name} is not the file that was saved: its sha256 differs; force_download=True'):
        load(client, published, tmp_path)
    # it stays in the cache, until it is fetched again
    with pytest.raises(Remote, match='sha256 differs'):
        load(client, published, tmp_path)
    assert load(client, published, tmp_path, force_download=True) == expected(directory)
    assert load(client, published, tmp_path) == expected(directory)


def test_a_config_that_was_changed_on_the_way(hub, client, directory, published, tmp_path):
    """It carries the hashes of the others; its own is its name in the cache."""
    hub.faults.append(Fault('GET .*/config.json', 'flip'))
    message = 'config.json is not the file that was published: its hash differs; force_download=True fetches it again'
    with pytest.raises(Remote, match=message):
        load(client, published, tmp_path)
    assert load(client, published, tmp_path, force_download=True) == expected(directory)
    # a change that nothing else tells, in the cache
    file, = tmp_path.glob('models--*/snapshots/*/config.json')
    content = file.read_text()
    file.write_text(content.replace('"top1": 60.0', '"top1": 90.0'))
    assert file.is_symlink() and file.read_text() != content
    for options in ({}, dict(local_files_only=True), dict(revision=file.parent.name)):
        with pytest.raises(Remote, match=message):
            load(client, published, tmp_path, **options)
    # the names of a mirror: a plain sha1; and one that tells nothing
    file.write_text(content)
    for name in (hashlib.sha1(content.encode()).hexdigest(), 'opaque'):
        blob = file.resolve().rename(file.resolve().with_name(name))
        file.unlink()
        file.symlink_to(os.path.relpath(blob, file.parent))
        assert load(client, published, tmp_path, local_files_only=True) == expected(directory)


@pytest.mark.parametrize('kind', ['500', 'lost'])
def test_an_older_commit_out_of_the_cache_is_told(hub, client, directory, net, generator, tmp_path, kind):
    name = f'org/older-{kind}'
    push(client, directory, name)
    old = hub.repos[name].branches['main']
    assert load(client, name, tmp_path / 'cache') == expected(directory)
    tsn.save_pretrained(tmp_path / 'model', net)
    push(client, tmp_path / 'model', name)
    hub.requests.clear()
    hub.faults.append(Fault('HEAD .*/config.json', kind))
    result, log = logged_load(client, name, tmp_path / 'cache')
    assert result == expected(directory) and f"this is commit {old} out of the cache, and there may be a newer" in log
    assert hub.requests == [f'HEAD /{name}/resolve/main/config.json']
    with pytest.raises(Remote, match='saved without a generator'):  # the newer one
        load(client, name, tmp_path / 'cache')


@pytest.mark.parametrize('change,message', [
    (lambda config: config['timm_shiftnas'].update(format=2), 'format 2.*upgrade'),
    (lambda config: config['model_args']['space']['width'].__setitem__(0, [8, 10 ** 12]), 'nothing above 1,000,000'),
    (lambda config: config['timm_shiftnas'].update(files={'../evil': dict(size=1, sha256='0' * 64)}),
     'timm_shiftnas.files'),
    (lambda config: config['model_args'].update(checkpoint_path='/etc/passwd'),
     'checkpoint_path, which is no argument'),
    (lambda config: config['model_args'].update(colour='red'), 'does not describe a network'),
    (lambda config: config['timm_shiftnas'].update(colour='red'), 'unknown entry timm_shiftnas.colour'),
    (lambda config: config['timm_shiftnas'].update(searched=[1]), 'config.json has an unusable entry .*searched'),
    (lambda config: config['pretrained_cfg'].update(input_size=[3, 10 ** 12, 10 ** 12]), 'nothing above 1,000,000'),
    (lambda config: config.pop('timm_shiftnas'), "has no 'timm_shiftnas' entry"),
])
def test_a_hostile_config(hub, client, directory, tmp_path, change, message):
    push(client, directory, 'org/hostile')
    repo = hub.repos['org/hostile']
    files = dict(repo.commits[repo.branches['main']])
    config = json.loads(files['config.json'])
    change(config)
    files['config.json'] = json.dumps(config).encode()
    repo.commit('main', files)
    with pytest.raises(Remote, match=message) as error:
        load(client, 'org/hostile', tmp_path)
    assert error.value.name == 'ValueError' and '\n' not in error.value.message
    repo.branches['main'] = next(iter(repo.commits))  # as it was made


def test_a_repository_of_something_else(hub, client, tmp_path):
    client('from huggingface_hub import create_repo\ncreate_repo("org/other")')
    with pytest.raises(Remote, match='holds no model of timm_shiftnas') as error:
        load(client, 'org/other', tmp_path)
    assert any(cls.endswith('EntryNotFoundError') for cls in error.value.classes)


# -- faults on pushing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pattern,kind', [
    ('POST .*/commit/main', '400'), ('POST .*/commit/main', '403'), ('PUT /lfs/', '403'),
    ('POST .*/preupload/main', '400'),
])
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, client, directory, net, tmp_path, pattern, kind):
    tsn.save_pretrained(tmp_path, net)
    push(client, tmp_path, 'org/fails')
    repo = hub.repos['org/fails']
    before = dict(repo.branches)
    hub.lfs.clear()
    hub.faults.append(Fault(pattern, kind, times=10))
    with pytest.raises(Remote, match='org/fails: it is as it was: no commit'):
        push(client, directory, 'org/fails')
    assert repo.branches == before
    del hub.repos['org/fails']


def test_passing_faults_before_the_commit(hub, client, directory):
    faults = [
        Fault('GET /api/models/org/passing', '500'), Fault('POST /api/repos/create', 'lost'),
        Fault('POST .*/branch/next', '503'), Fault('GET .*/tree/', 'cut'), Fault('POST /api/validate-yaml', '502'),
        Fault('POST .*/objects/batch', '500')]
    hub.lfs.clear()
    hub.faults += faults
    address = push(client, directory, 'org/passing', revision='next')
    assert len(hub.repos['org/passing'].commits) == 2
    assert not any(fault.times for fault in faults)
    assert address.endswith(hub.repos['org/passing'].branches['next'])


def test_a_lost_answer_of_making_the_repository(hub, client, directory):
    hub.faults += [Fault('POST /api/repos/create', 'lost'), Fault('POST .*/preupload/', '400')]
    with pytest.raises(Remote, match='org/half-made: no commit was made; the repository is new$'):
        push(client, directory, 'org/half-made')
    assert len(hub.repos['org/half-made'].commits) == 1


@pytest.mark.parametrize('pattern,options,message', [
    ('POST .*/preupload/', {}, 'no commit was made; the repository is new and empty: push again, or delete it$'),
    ('POST .*/preupload/', dict(revision='next'),
     "no commit was made; .* is new and empty: .*; its branch 'next' is new, with what main has$"),
    ('POST .*/branch/', dict(revision='next'), 'no commit was made; the repository is new and empty: [^;]*$'),
    ('GET .*/tree/', {}, 'no commit was made; the repository is new and empty'),
    ('GET /api/models/org/refused', {}, 'it is as it was: no commit was made$'),
    ('POST /api/repos/create', {}, 'it is as it was: no commit was made$'),
])
def test_a_refused_push_says_what_it_made(hub, client, directory, pattern, options, message):
    hub.faults.append(Fault(pattern, '400', times=9))
    with pytest.raises(Remote, match=f'\norg/refused: {message}') as error:
        push(client, directory, 'org/refused', **options)
    assert any(cls.endswith('HfHubHTTPError') for cls in error.value.classes)
    assert error.value.message.count('no commit') == 1
    hub.repos.pop('org/refused', None)


@pytest.mark.parametrize('pattern,kind,message', [
    ('POST .*/preupload/main', '403', 'no commit and no pull request was made$'),
    ('POST .*/commit/main', '400', 'no commit and no pull request was made$'),
    ('POST /api/validate-yaml', '500', 'no commit and no pull request was made$'),
    ('POST .*/commit/main', 'lost', 'whether the pull request exists could not be found out: see its page$'),
])
def test_a_pull_request_that_is_refused(hub, client, directory, net, tmp_path, pattern, kind, message):
    if 'org/asked' not in hub.repos:
        push(client, directory, 'org/asked')
    hub.faults.append(Fault(pattern, kind, times=9))
    tsn.save_pretrained(tmp_path, net)
    with pytest.raises(Remote, match=f'org/asked: .*{message}'):
        push(client, tmp_path, 'org/asked', create_pr=True)
    assert ('refs/pr/1' in hub.repos['org/asked'].branches) == (kind == 'lost')
    with pytest.raises(Remote, match='org/nowhere: it is as it was: no commit and no pull request was made'):
        push(client, tmp_path, 'org/nowhere', create_pr=True)
    assert 'org/nowhere' not in hub.repos


def test_a_lost_answer_of_a_commit(hub, client, directory):
    hub.faults.append(Fault('POST .*/commit/main', 'lost', times=1))
    address = push(client, directory, 'org/lost')
    repo = hub.repos['org/lost']
    assert address.endswith(repo.branches['main']) and len(repo.commits) == 2
    assert re.search('POST .*/commit/main', '\n'.join(hub.requests))


def test_whether_the_commit_exists_is_not_made_up(hub, client, directory, net, tmp_path):
    """It is made, its answer is lost, and then nothing can be asked any more."""
    push(client, directory, 'org/unknown')
    repo = hub.repos['org/unknown']
    tsn.save_pretrained(tmp_path, net)
    hub.faults.append(Fault('POST .*/commit/main', 'lost'))
    hub.after_commit = lambda: hub.faults.append(Fault('GET /api/models/org/unknown', '400', times=99))
    with pytest.raises(Remote, match='whether the commit exists could not be found out'):
        push(client, tmp_path, 'org/unknown')
    assert len(repo.commits) == 3


def test_two_pushes_at_once(hub, client, directory, net, tmp_path):
    """A commit that comes between looking and pushing: refused, not mixed."""
    push(client, directory, 'org/race')
    repo = hub.repos['org/race']
    tsn.save_pretrained(tmp_path, net)
    hub.between = lambda: repo.commit('main', {**repo.commits[repo.branches['main']], 'notes.txt': b'another'})
    with pytest.raises(Remote, match='it changed meanwhile: push again'):
        push(client, tmp_path, 'org/race')
    assert repo.commits[repo.branches['main']]['notes.txt'] == b'another'
    push(client, tmp_path, 'org/race')
    assert 'generator.safetensors' not in repo.commits[repo.branches['main']]


def test_no_network(without_network, directory):
    with pytest.raises(Remote, match='connect to the network') as error:
        without_network.receive()
    assert any(cls.endswith(('LocalEntryNotFoundError', 'ConnectionError')) for cls in error.value.classes)
    with pytest.raises(Remote, match='the connection failed: try again.*org/tiny: .*no commit was made') as error:
        push(without_network, directory, 'org/tiny')
    assert 'builtins.ConnectionError' in error.value.classes
