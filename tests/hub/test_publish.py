"""The Hub: huggingface_hub's real client, in its own process, against a small Hub on this machine."""
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from support.hub_client import Client, fails
from support.hub_server import Fault, Hub

import timm_shiftnas as tsn
from timm_shiftnas.hub.card import model_card
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.push import published_files
from timm_shiftnas.models import bn_statistics

pytestmark = [pytest.mark.slow, pytest.mark.process]

ROOT = Path(__file__).parents[2]
BUDGET = 3_276_000.  # of a group
FILES = {'config.json', 'model.safetensors', 'generator.safetensors', 'bn_stats.safetensors'}


@pytest.fixture(scope='module')
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    process = Client(hub, tmp_path_factory.mktemp('home'), HF_TOKEN='writer')
    yield process
    process.close()


@pytest.fixture(autouse=True)
def quiet(hub):
    hub.requests.clear()
    yield
    hub.faults.clear()  # before the fixtures of the next test


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
    """A directory of train.py: pictures beside the model."""
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


@pytest.fixture(scope='module')
def plain(tmp_path_factory, net):
    """The same supernet without generator, results and pictures."""
    folder = tmp_path_factory.mktemp('plain')
    tsn.save_pretrained(folder, net)
    return folder


LOAD = '''
import io, logging
log, logger = io.StringIO(), logging.getLogger('timm_shiftnas')
handler = logging.StreamHandler(log)
logger.addHandler(handler)
try:
    net = tsn.from_pretrained(repo, flops=budget, cache_dir=cache, **options)
finally:
    logger.removeHandler(handler)
result = [net.arch.to_dict(), float(sum(p.double().sum() for p in net.state_dict().values()))], log.getvalue()
'''


def push(client, directory, repo, pictures=False, **options):
    """Push with pictures only where a test looks at them: they are most of the work."""
    code = 'result = tsn.push_directory(directory, repo, **options)'
    return client(
        code if pictures else f'with without_matplotlib():\n    {code}', directory=str(directory), repo=repo,
        options=options)


def logged_load(client, repo, cache, **options):
    """The arch and the sum of all weights for a budget, and what was logged."""
    return client(LOAD, repo=repo, cache=str(cache), budget=BUDGET, options=options)


def load(client, repo, cache, **options):
    return logged_load(client, repo, cache, **options)[0]


def files_of(hub, name, branch='main'):
    repo = hub.repos[name]
    return repo.commits[repo.branches[branch]]


@pytest.fixture(scope='module')
def published(client, directory):
    push(client, directory, 'org/tiny', pictures=True, license='mit')
    return 'org/tiny'


@pytest.fixture(scope='module')
def expected(directory):
    net = tsn.from_pretrained(directory / 'model', flops=BUDGET)
    return [net.arch.to_dict(), float(sum(p.double().sum() for p in net.state_dict().values()))]


# -- push --------------------------------------------------------------------------------------------------------------


def test_one_commit_holds_everything(hub, client, directory):
    address = push(client, directory, 'org/everything', pictures=True, private=True)
    repo = hub.repos['org/everything']
    assert repo.private and len(repo.commits) == 2
    assert address == f'{hub.url}/org/everything/commit/{repo.branches["main"]}'
    files = files_of(hub, 'org/everything')
    assert set(files) == {
        '.gitattributes', 'README.md', 'budgets.csv', 'accuracy.png', 'report.html', 'shift.png', *FILES}
    for name in FILES:
        assert files[name] == (directory / 'model' / name).read_bytes()
    assert files['shift.png'] == (directory / 'shift.png').read_bytes()
    assert sum(' /api/models/org/everything/commit' in line for line in hub.requests) == 1
    push(client, directory, 'org/everything', pictures=True)
    assert len(repo.commits) == 2  # the repository has it already


def test_an_update_deletes_stale_files(hub, client, net, generator, plain, tmp_path):
    tsn.save_pretrained(tmp_path, net, generator)
    push(client, tmp_path, 'org/update')
    with fails('ValueError', 'org/update', 'no commit'):  # it is public already
        push(client, tmp_path, 'org/update', private=True)
    first = hub.repos['org/update'].branches['main']
    push(client, plain, 'org/update')
    assert 'generator.safetensors' not in files_of(hub, 'org/update') and len(hub.repos['org/update'].commits) == 3
    # the old commit still loads by its name
    with fails('ValueError', 'org/update', 'arch='):
        load(client, 'org/update', tmp_path / 'cache')
    arch = net.space.smallest.to_dict()
    client('tsn.from_pretrained("org/update", arch=arch, cache_dir=cache)', arch=arch, cache=str(tmp_path / 'cache'))
    assert load(client, 'org/update', tmp_path / 'cache', revision=first)


def test_push_to_hub_of_objects_and_pull_requests(hub, client):
    client('''
net = timm.create_model('test_shiftmobilenet_supernet', num_classes=4)
tsn.push_to_hub('org/objects', net, tsn.ArchitectureGenerator(net.space), commit_message='a message')
''')
    address = client('result = tsn.push_to_hub("org/objects", tsn.extract(net, net.space.smallest), create_pr=True)')
    assert address == f'{hub.url}/org/objects/discussions/1'
    assert 'generator.safetensors' in files_of(hub, 'org/objects')
    assert 'generator.safetensors' not in files_of(hub, 'org/objects', 'refs/pr/1')
    client('tsn.from_pretrained("org/objects", revision="refs/pr/1")')


def test_a_wrapped_network_is_pushed_as_the_plain_one(hub, client, tmp_path):
    """Wrapped by DDP, as in a training on several GPUs, by EMA, and by both."""
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
    weights = files_of(hub, 'org/plain')['model.safetensors']
    assert not any(key.startswith('module.') for key in safetensors.torch.load(weights))
    for name in ('org/ddp', 'org/ema', 'org/both'):
        assert files_of(hub, name)['model.safetensors'] == weights


def test_a_missing_branch_is_created(hub, client, directory, plain, expected, tmp_path):
    push(client, directory, 'org/branches', revision='next')  # the repository is missing too
    repo = hub.repos['org/branches']
    assert set(files_of(hub, 'org/branches')) == {'.gitattributes'} and len(repo.commits) == 2
    assert load(client, 'org/branches', tmp_path / 'cache', revision='next') == expected
    # a second one starts from main; its name has a slash
    push(client, directory, 'org/branches')
    push(client, plain, 'org/branches', revision='try/this')
    files = files_of(hub, 'org/branches', 'try/this')
    assert 'model.safetensors' in files and not {'generator.safetensors', 'shift.png'} & set(files)
    assert 'generator.safetensors' in files_of(hub, 'org/branches')
    before = dict(repo.branches)
    for options, error, named in (
            (dict(revision=repo.branches['main']), 'ValueError', [repo.branches['main']]),  # a commit
            (dict(revision='next', create_pr=True), 'ValueError', ["'next'", 'create_pr']),
            (dict(revision='refs/pr/7'), 'RevisionNotFoundError', ['revision=', 'no commit']),
            (dict(revision='by-a-reader', token='reader'), 'HfHubHTTPError', ['token=', 'no commit'])):
        with fails(error, *named):
            push(client, directory, 'org/branches', **options)
    assert repo.branches == before


def test_the_command_line(hub, client, directory, tmp_path):
    codes, text = client('''
import contextlib, io
from timm_shiftnas_cli import main as cli
stream = io.StringIO()
with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
    codes = [cli(['push', directory, 'org/cli', '--private']),
             cli(['extract', directory + '/model', '--flops', budget, '--output', out, '--push', 'org/cli-sub']),
             cli(['push', directory, 'not a repo']), cli(['push', out + '/nowhere', 'org/cli'])]
result = codes, stream.getvalue()
''', directory=str(directory), out=str(tmp_path / 'out'), budget=str(BUDGET))
    assert codes == [0, 0, 2, 2], text
    assert f'{hub.url}/org/cli/commit/' in text and f'{hub.url}/org/cli-sub/commit/' in text
    assert 'not a repo' in text and f'{tmp_path}/out/nowhere' in text
    with fails('ValueError', 'BatchNorm', '--data-dir'):
        client("from timm_shiftnas.cli import run_extract\nfrom timm_shiftnas_cli import build_parser\n"
               "run_extract(build_parser().parse_args(['extract', directory + '/model', '--flops', '2M', '--output', "
               "out, '--overwrite', '--push', 'org/cli-none']))",
               directory=str(directory), out=str(tmp_path / 'none'))
    assert hub.repos['org/cli'].private
    assert json.loads(files_of(hub, 'org/cli-sub')['config.json'])['timm_shiftnas']['kind'] == 'subnet'
    assert client('''
a = tsn.from_pretrained('org/cli-sub')
b = timm.create_model('hf-hub:org/cli-sub', pretrained=True).eval()
x = torch.randn(2, 3, a.arch.resolution, a.arch.resolution)
result = torch.equal(a(x), b(x))
''')


def test_train_publishes(hub, client, tmp_path):
    flags = ['--dataset', 'sklearn/digits', '--held-out', '0.5', '--model', 'test_shiftformer_supernet', '--img-size',
             '16', '-j', '0', '-b', '256', '--epochs', '1', '--num-groups', '2', '--generator-fit-steps', '5',
             '--output', str(tmp_path), '--hub-private']
    code = client('''
import sys
sys.path.insert(0, root)
from timm_shiftnas.training import trainer as train
result = train.main([*flags, '--experiment', 'a', '--push-to-hub', 'org/trained'])
''', flags=flags, root=str(ROOT))
    assert code == 0
    files = files_of(hub, 'org/trained')
    assert hub.repos['org/trained'].private
    assert {'shift.png', 'accuracy.png', 'budgets.csv', 'model.safetensors'} <= set(files)
    card = files['README.md'].decode()
    assert '--model test_shiftformer_supernet' in card and 'sklearn/digits' in card and str(tmp_path) not in card
    # resuming the finished run publishes again; a refused push leaves the model where it is
    hub.faults.append(Fault('POST .*/preupload/main', '403', times=9))
    resumed = client(
        "result = train.main([*flags, '--experiment', 'a', '--resume', 'auto', '--push-to-hub', 'org/trained'])")
    assert resumed == 2 and hub.faults[0].times < 9 and (tmp_path / 'a' / 'model' / 'config.json').exists()


def test_a_published_subnet_is_fine_tuned_and_published(hub, client, net, tmp_path):
    tsn.save_pretrained(tmp_path / 'subnet', tsn.extract(net, net.space.smallest))
    push(client, tmp_path / 'subnet', 'owner/subnet')
    code = '''
from timm_shiftnas.training import trainer
result = trainer.main(['--dataset', 'sklearn/digits', '-j', '0', '-b', '128', '--epochs', '1', '--lr', '0',
                       '--warmup-epochs', '0', '--model', 'hf-hub:owner/subnet', '--output', output,
                       '--experiment', 'run', '--push-to-hub', 'owner/tuned'])
'''
    assert client(code, output=str(tmp_path)) == 0
    tuned, saved = (tsn.from_pretrained(tmp_path / name) for name in ('run/model', 'subnet'))
    assert tuned.arch == saved.arch == net.space.smallest
    assert all(torch.equal(weight, other) for weight, other in zip(tuned.parameters(), saved.parameters(), strict=True))
    assert '--model hf-hub:owner/subnet' in files_of(hub, 'owner/tuned')['README.md'].decode()
    for name in files_of(hub, 'owner/tuned'):
        assert str(tmp_path).encode() not in files_of(hub, 'owner/tuned')[name]


def test_files_of_others_stay(hub, client, net, plain, tmp_path):
    client('''
from huggingface_hub import HfApi
api, card = HfApi(), b'---\\nlicense: mit\\n---\\n# By hand'
api.create_repo('org/mine')
for name, content in (('README.md', card), ('shift.png', b'mine'), ('notes.txt', b'mine')):
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id='org/mine')
''')
    push(client, plain, 'org/mine')
    files = files_of(hub, 'org/mine')
    assert files['README.md'].endswith(b'# By hand') and files['shift.png'] == files['notes.txt'] == b'mine'
    assert 'model.safetensors' in files
    # a picture beside a directory that train.py did not write is not published
    shutil.copytree(plain, tmp_path / 'model')
    (tmp_path / 'shift.png').write_bytes(b'secret')
    push(client, tmp_path / 'model', 'org/chance')
    assert 'shift.png' not in files_of(hub, 'org/chance')


def test_nothing_but_checked_tensors_is_pushed(hub, client, plain, tmp_path):
    def change(name, data, checked):
        folder = shutil.copytree(plain, tmp_path / f'{name} {checked}')
        (folder / name).write_bytes(data)
        if checked:  # let the config list the file as it is now
            config = json.loads((folder / 'config.json').read_text())
            config['timm_shiftnas']['files'][name] = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
            (folder / 'config.json').write_text(json.dumps(config))
        return folder

    data = (plain / 'model.safetensors').read_bytes()
    for folder, named in (
            (change('pytorch_model.bin', pickle.dumps(1), True), 'timm_shiftnas.files'),
            (change('model.safetensors', pickle.dumps(1), True), 'model.safetensors'),
            (change('model.safetensors', data[:-1] + bytes([data[-1] ^ 1]), False), 'sha256')):
        with fails('ValueError', named):
            push(client, folder, 'org/pickle')
    assert 'org/pickle' not in hub.repos and not hub.requests


@pytest.mark.parametrize('link', ['shift.png', 'model/config.json', 'model/model.safetensors', 'model'])
def test_what_links_lead_to_is_not_pushed(hub, client, directory, tmp_path, link):
    run, secret = shutil.copytree(directory, tmp_path / 'run'), tmp_path / 'secret'
    shutil.move(run / link, secret)  # so that the content is right
    (run / link).symlink_to(secret)
    with fails('ValueError', f'{run / link} is a link'):
        push(client, run, 'org/linked')
    assert 'org/linked' not in hub.repos and not hub.requests


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card(hub, directory, published):
    text = files_of(hub, published)['README.md'].decode()
    _, front, body = text.split('---\n', 2)
    metadata = yaml.safe_load(front)
    assert metadata['library_name'] == 'timm' and metadata['pipeline_tag'] == 'image-classification'
    assert {'timm', 'timm_shiftnas'} <= set(metadata['tags']) and metadata['license'] == 'mit'
    metrics = [metric for result in metadata['model-index'][0]['results'] for metric in result['metrics']]
    assert [metric['value'] for metric in metrics] == [60., 61., 62.]
    saved = SavedModel(directory / 'model')
    for row in saved.record.results:
        assert f'| {row["name"]} |' in body and f'| {row["top1"]:.2f} |' in body
    assert '![top-1 against MACs](accuracy.png)' in body and '](shift.png)' in body
    assert f"from_pretrained('{published}', flops=" in body
    assert 'python train.py --epochs 3' in body and 'timm 1.0.31' in body and '@inproceedings{zhang2023shiftnas' in body
    assert '](report.html)' in body
    assert str(model_card(saved, published, ['accuracy.png', 'shift.png', 'report.html'], 'mit')) == text


def test_the_card_is_readable(net, tmp_path):
    """The numbers of a column line up, a long command breaks between flags, and the card of a subnet has no curve."""
    values = dict(budget=3_970_000., macs=999_960, params=146_000, top1=60., top5=100.,
                  arch=net.space.smallest.to_dict())
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
    files = published_files(SavedModel(tmp_path / 'subnet'), 'org/card', None, None)
    assert 'accuracy.png' not in files and 'budgets.csv' in files
    assert '## Accuracy' in files['README.md'].decode() and '.png' not in files['README.md'].decode()


# -- load --------------------------------------------------------------------------------------------------------------


def test_load_by_budget(hub, client, published, expected, tmp_path):
    assert load(client, published, tmp_path) == expected
    # each file once, all from one commit
    gets = [line for line in hub.requests if line.startswith('GET')]
    sha = hub.repos[published].branches['main']
    assert sorted(line.rpartition('/')[2] for line in gets) == sorted(FILES)
    assert sum(f'/resolve/{sha}/' in line for line in gets) >= 3
    assert len(hub.requests) == 2 * len(gets) + 1  # one HEAD for each, and the first one for the branch
    hub.requests.clear()
    assert load(client, published, tmp_path) == expected
    assert hub.requests == [f'HEAD /{published}/resolve/main/config.json']


def test_all_files_come_from_one_commit(hub, client, directory, plain, expected, tmp_path):
    """The branch moves on between the config and the weights."""
    push(client, directory, 'org/moving')
    repo = hub.repos['org/moving']
    old = repo.branches['main']
    hub.after_get = lambda: repo.commit('main', {
        path.name: path.read_bytes() for path in plain.iterdir() if path.is_file()})
    assert load(client, 'org/moving', tmp_path) == expected
    assert repo.branches['main'] != old
    assert all(f'/resolve/{old}/' in line for line in hub.requests if line.endswith('.safetensors'))


def test_the_supernet_through_timm(client, directory, published, net):
    total, *rest = client('''
net = timm.create_model('hf-hub:org/tiny', pretrained=True)
result = [float(sum(p.double().sum() for p in net.parameters())), net.space.size, net.num_classes]
''')
    saved = safetensors.torch.load_file(directory / 'model' / 'model.safetensors')
    assert total == pytest.approx(float(sum(saved[name].double().sum() for name, _ in net.named_parameters())))
    assert rest == [net.space.size, 10]


def test_offline_from_the_cache(hub, client, published, expected, tmp_path):
    load(client, published, tmp_path / 'a')
    hub.requests.clear()
    assert load(client, published, tmp_path / 'a', local_files_only=True) == expected
    assert not hub.requests
    with fails('LocalEntryNotFoundError'):
        load(client, published, tmp_path / 'b', local_files_only=True)


def test_offline_mode_and_a_client_with_xet(directory, expected, tmp_path):
    with Hub(lfs=False) as hub:
        client = Client(hub, tmp_path / 'home', HF_TOKEN='writer', HF_HUB_DISABLE_XET='0')
        push(client, directory, 'org/tiny')
        assert load(client, 'org/tiny', tmp_path / 'cache') == expected
        client.close()
    client = Client(hub, tmp_path / 'home', HF_HUB_OFFLINE='1')  # the Hub is gone
    assert load(client, 'org/tiny', tmp_path / 'cache') == expected
    with fails('LocalEntryNotFoundError'):
        load(client, 'org/tiny', tmp_path / 'other')
    client.close()


def test_no_network(directory, tmp_path):
    with Hub() as gone:
        pass  # its port is closed again
    client = Client(gone, tmp_path)
    with fails('ConnectionError', 'org/tiny'):
        load(client, 'org/tiny', tmp_path / 'cache')
    with fails('ConnectionError', 'org/tiny', 'no commit'):
        push(client, directory, 'org/tiny')
    client.close()


def test_private_repositories_and_tokens(hub, client, directory, expected, tmp_path):
    push(client, directory, 'org/secret', private=True)
    assert load(client, 'org/secret', tmp_path / 'a', token='reader') == expected
    for repo, options, error, named in (
            ('org/secret', dict(token=False), 'RepositoryNotFoundError', 'token='),
            ('org/missing', {}, 'RepositoryNotFoundError', 'check the name'),
            ('org/secret', dict(token='expired'), 'HfHubHTTPError', 'log in again'),
            ('org/secret', dict(revision='nowhere'), 'RevisionNotFoundError', 'revision=')):
        with fails(error, repo, named):
            load(client, repo, tmp_path / 'b', **options)
    # a name that is taken, but hidden from this token, is not reported as a new repository
    with fails('RepositoryNotFoundError', 'org/secret', 'unchanged', 'no commit'):
        push(client, directory, 'org/secret', token='stranger')
    with fails('HfHubHTTPError', 'org/secret', 'no commit', 'token='):
        push(client, directory, 'org/secret', token='reader')


def test_a_gated_repository(hub, client, directory, expected, tmp_path):
    push(client, directory, 'org/gated')
    hub.repos['org/gated'].gated = True
    for token in ('reader', False):
        with fails('GatedRepoError', 'org/gated', 'token='):
            load(client, 'org/gated', tmp_path, token=token)
    assert load(client, 'org/gated', tmp_path) == expected


def test_an_expired_token(hub, client, directory, expected, tmp_path):
    """A cached model still loads; for a branch, a warning says that there may be a newer commit."""
    push(client, directory, 'org/expires', private=True)
    sha = hub.repos['org/expires'].branches['main']
    hub.tokens['old'] = False
    assert logged_load(client, 'org/expires', tmp_path / 'cache', token='old') == (expected, '')
    del hub.tokens['old']
    result, log = logged_load(client, 'org/expires', tmp_path / 'cache', token='old')
    assert result == expected and sha in log and 'log in again' in log
    hub.requests.clear()
    assert logged_load(client, 'org/expires', tmp_path / 'cache', token='old', revision=sha) == (expected, '')
    assert not hub.requests
    with fails('HfHubHTTPError', 'log in again'):
        load(client, 'org/expires', tmp_path / 'other', token='old', revision=sha)
    with fails('HfHubHTTPError', 'log in again', 'org/expires', 'no commit'):
        push(client, directory, 'org/expires', token='old')


# -- faults while loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pattern,kind', [
    ('GET .*/model.safetensors', '500'), ('GET .*/model.safetensors', 'cut'), ('HEAD .*/config.json', '500'),
    ('GET .*/generator.safetensors', 'lost'),
])
def test_a_transient_fault_is_retried(hub, client, published, expected, tmp_path, pattern, kind):
    hub.faults.append(Fault(pattern, kind))
    assert load(client, published, tmp_path) == expected
    assert hub.faults[0].times == 0


def test_a_lasting_fault(hub, client, published, tmp_path):
    hub.faults.append(Fault('GET .*/model.safetensors', '500', times=100))
    with fails('HfHubHTTPError', 'model.safetensors'):
        load(client, published, tmp_path)


@pytest.mark.parametrize('pattern, kind, wait', [
    ('HEAD', '500', None), ('HEAD', '429', 3600), ('GET .*/config', '429', 3600), ('GET .*/model', '503', 3600),
    ('GET .*/model', '429', 12), ('HEAD .*/model', '500', None),
])
def test_a_busy_hub_is_waited_for_at_most_30_seconds(hub, client, published, tmp_path, pattern, kind, wait):
    client('waits.clear()')
    hub.faults.append(Fault(pattern, kind, times=100, wait=wait))
    with fails('HfHubHTTPError', *([f'{wait} s', 'try again later'] if wait == 3600 else [])):
        logged_load(client, published, tmp_path)
    waited = client('result = waits')
    assert sum(waited) <= 30 and (0 < len(waited) <= 2 or wait == 3600 and not waited), waited


def test_a_wait_is_announced(hub, client, published, expected, tmp_path):
    client('waits.clear()')
    hub.faults.append(Fault('GET .*/model', '429', wait=7))
    result, log = logged_load(client, published, tmp_path)
    assert result == expected and client('result = waits') == [7]
    assert f'{published}: the Hub answered with status 429; trying again in 7 s' in log


@pytest.mark.parametrize('name, size, named', [
    ('model.safetensors', 3_000_000, '3000000 bytes instead of'), ('model.safetensors', 10, '10 bytes instead of'),
    ('generator.safetensors', 3_000_000, '3000000 bytes instead of'), ('config.json', 90_000_000, '90,000,000 bytes'),
])
def test_a_file_of_another_size_is_not_downloaded(hub, client, published, tmp_path, name, size, named):
    repo = hub.repos[published]
    good = repo.branches['main']
    repo.commit('main', dict(repo.commits[good], **{name: bytes(size)}))
    try:
        with fails('ValueError', f'{published}/{name}', named):
            load(client, published, tmp_path)
    finally:
        repo.branches['main'] = good
    assert not any(line.startswith('GET') and line.endswith(name) for line in hub.requests)


@pytest.mark.parametrize('name', ['model.safetensors', 'bn_stats.safetensors', 'generator.safetensors'])
def test_a_flipped_bit(hub, client, published, expected, tmp_path, name):
    hub.faults.append(Fault(f'GET .*/{name}', 'flip'))
    for _ in range(2):  # it stays in the cache
        with fails('ValueError', name, 'sha256', 'force_download=True'):
            load(client, published, tmp_path)
    assert load(client, published, tmp_path, force_download=True) == expected
    assert load(client, published, tmp_path) == expected


def test_a_config_that_was_changed_on_the_way(hub, client, published, expected, tmp_path):
    """The config carries the hashes of the other files; its own is its name in the cache."""
    hub.faults.append(Fault('GET .*/config.json', 'flip'))
    named = 'config.json', 'hash', 'force_download=True'
    with fails('ValueError', *named):
        load(client, published, tmp_path)
    assert load(client, published, tmp_path, force_download=True) == expected
    # a change in the cache that is still a valid config
    file, = tmp_path.glob('models--*/snapshots/*/config.json')
    content = file.read_text()
    file.write_text(content.replace('"top1": 60.0', '"top1": 90.0'))
    assert file.is_symlink() and file.read_text() != content
    for options in ({}, dict(local_files_only=True), dict(revision=file.parent.name)):
        with fails('ValueError', *named):
            load(client, published, tmp_path, **options)
    # names of mirrors: a plain sha1, and one without a hash
    file.write_text(content)
    for name in (hashlib.sha1(content.encode()).hexdigest(), 'opaque'):
        blob = file.resolve().rename(file.resolve().with_name(name))
        file.unlink()
        file.symlink_to(os.path.relpath(blob, file.parent))
        assert load(client, published, tmp_path, local_files_only=True) == expected


@pytest.mark.parametrize('kind', ['500', 'lost'])
def test_an_older_commit_from_the_cache_warns(hub, client, directory, plain, expected, tmp_path, kind):
    name = f'org/older-{kind}'
    push(client, directory, name)
    old = hub.repos[name].branches['main']
    assert load(client, name, tmp_path) == expected
    push(client, plain, name)
    hub.requests.clear()
    hub.faults.append(Fault('HEAD .*/config.json', kind))
    result, log = logged_load(client, name, tmp_path)
    assert result == expected and old in log and "'main'" in log
    assert hub.requests == [f'HEAD /{name}/resolve/main/config.json']
    with fails('ValueError', 'without a generator'):  # the newer one
        load(client, name, tmp_path)


@pytest.mark.parametrize('change,named', [
    (lambda config: config['timm_shiftnas'].update(format=2), 'format 2'),
    (lambda config: config['model_args']['space']['width'].__setitem__(0, [8, 10 ** 12]), '1000000000000'),
    (lambda config: config['model_args'].update(checkpoint_path='/etc/passwd'), 'checkpoint_path'),
])
def test_a_hostile_config(hub, client, published, tmp_path, change, named):
    """More of them, in a directory, are in test_hub.py."""
    repo = hub.repos[published]
    good = repo.branches['main']
    files = dict(repo.commits[good])
    config = json.loads(files['config.json'])
    change(config)
    repo.commit('main', {**files, 'config.json': json.dumps(config).encode()})
    try:
        with fails('ValueError', f'{published}/config.json', named) as error:
            load(client, published, tmp_path)
    finally:
        repo.branches['main'] = good
    assert '\n' not in error.value.message
    assert not any(line.endswith('.safetensors') for line in hub.requests)


def test_a_repository_of_something_else(hub, client, tmp_path):
    client('from huggingface_hub import create_repo\ncreate_repo("org/other")')
    with fails('EntryNotFoundError', 'timm.create_model'):
        load(client, 'org/other', tmp_path)


# -- faults while pushing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pattern,kind', [
    ('POST .*/commit/main', '403'), ('PUT /lfs/', '403'), ('POST .*/preupload/main', '400'),
])
def test_a_refused_push_leaves_the_repository_unchanged(hub, client, directory, plain, pattern, kind):
    push(client, plain, 'org/fails')
    repo = hub.repos['org/fails']
    before = dict(repo.branches)
    hub.lfs.clear()
    hub.faults.append(Fault(pattern, kind, times=10))
    with fails('Exception', 'org/fails', 'unchanged', 'no commit'):
        push(client, directory, 'org/fails')
    assert repo.branches == before


def test_transient_faults_before_the_commit(hub, client, directory):
    hub.lfs.clear()
    hub.faults += [
        Fault('GET /api/models/org/passing', '500'), Fault('POST /api/repos/create', 'lost'),
        Fault('GET .*/revision/next', 'cut'), Fault('POST .*/branch/next', '503'),
        Fault('POST /api/validate-yaml', '502'), Fault('POST .*/objects/batch', '500')]
    address = push(client, directory, 'org/passing', revision='next')
    assert len(hub.repos['org/passing'].commits) == 2
    assert [fault for fault in hub.faults if fault.times] == []
    assert address.endswith(hub.repos['org/passing'].branches['next'])


@pytest.mark.parametrize('faults,options,named', [
    ([('POST .*/preupload/', '400')], {}, ['the repository is new and empty']),
    ([('POST .*/preupload/', '400')], dict(revision='next'), ['the repository is new and empty', "'next' is new"]),
    ([('POST .*/branch/', '400')], dict(revision='next'), ['the repository is new and empty']),
    ([('POST /api/repos/create', 'lost'), ('POST .*/preupload/', '400')], {}, ['the repository is new']),
    ([('GET /api/models/org/refused', '400')], {}, ['unchanged']),
    ([('POST /api/repos/create', '400')], {}, ['unchanged']),
])
def test_a_refused_push_lists_what_it_created(hub, client, directory, faults, options, named):
    hub.faults += [Fault(pattern, kind, times=1 if kind == 'lost' else 9) for pattern, kind in faults]
    with fails('HfHubHTTPError', '\norg/refused: ', 'no commit', *named) as error:
        push(client, directory, 'org/refused', **options)
    message = error.value.message
    assert message.count('no commit') == 1
    for word in ('unchanged', "'next' is new", 'the repository is new'):
        assert any(word in each for each in named) == (word in message)
    assert ('the repository is new' in message) == (hub.repos.pop('org/refused', None) is not None)


@pytest.mark.parametrize('pattern,kind', [
    ('POST .*/preupload/main', '403'), ('POST .*/commit/main', '400'), ('POST /api/validate-yaml', '500'),
    ('POST .*/commit/main', 'lost'),
])
def test_a_refused_pull_request(hub, client, directory, plain, pattern, kind):
    if 'org/asked' not in hub.repos:
        push(client, directory, 'org/asked')
    hub.faults.append(Fault(pattern, kind, times=9))
    with fails('Exception', 'org/asked: ', 'unknown' if kind == 'lost' else 'no pull request'):
        push(client, plain, 'org/asked', create_pr=True)
    assert ('refs/pr/1' in hub.repos['org/asked'].branches) == (kind == 'lost')
    with fails('RepositoryNotFoundError', 'org/nowhere', 'unchanged', 'no pull request'):
        push(client, plain, 'org/nowhere', create_pr=True)
    assert 'org/nowhere' not in hub.repos


def test_a_lost_answer_to_a_commit(hub, client, directory):
    """The commit is found, and it is not sent again."""
    hub.faults.append(Fault('POST .*/commit/main', 'lost'))
    address = push(client, directory, 'org/lost')
    repo = hub.repos['org/lost']
    assert address.endswith(repo.branches['main']) and len(repo.commits) == 2
    assert sum('/commit/main' in line for line in hub.requests) == 1


def test_a_commit_that_was_refused_for_now_is_sent_again(hub, client, directory):
    hub.faults.append(Fault('POST .*/commit/main', '429', wait=2))
    address = push(client, directory, 'org/later')
    repo = hub.repos['org/later']
    assert address.endswith(repo.branches['main']) and len(repo.commits) == 2
    assert sum('/commit/main' in line for line in hub.requests) == 2
    client('waits.clear()')
    hub.faults.append(Fault('PUT /lfs/', '429', times=100, wait=3600))
    hub.lfs.clear()
    with fails('HfHubHTTPError', 'org/later', 'no commit', '3600 s'):
        client('tsn.push_to_hub("org/later", timm.create_model("test_shiftformer_supernet"))')
    assert client('result = waits') == []


@pytest.mark.parametrize('after', ['no answer', 'another commit'])
def test_an_unknown_commit_is_reported_as_unknown(hub, client, directory, plain, after):
    """The commit is created and its answer lost; then the Hub stops answering, or the branch moves on."""
    name = f'org/{after.replace(" ", "-")}'
    push(client, directory, name)
    repo = hub.repos[name]
    hub.faults.append(Fault('POST .*/commit/main', 'lost'))
    hub.after_commit = lambda: (
        hub.faults.append(Fault(f'GET /api/models/{name}', '400', times=99)) if after == 'no answer' else
        repo.commit('main', {'model.safetensors': b'of another'}))
    with fails('ConnectionError', name, 'unknown'):
        push(client, plain, name)
    assert len(repo.commits) == (3 if after == 'no answer' else 4)


def test_two_pushes_at_once(hub, client, directory, plain):
    """Another commit comes between looking and pushing: the push is refused, and the files are not mixed."""
    push(client, directory, 'org/race')
    repo = hub.repos['org/race']
    hub.between = lambda: repo.commit('main', {**files_of(hub, 'org/race'), 'notes.txt': b'another'})
    with fails('HfHubHTTPError', 'org/race', 'no commit', 'push again'):
        push(client, plain, 'org/race')
    assert files_of(hub, 'org/race')['notes.txt'] == b'another'
    push(client, plain, 'org/race')
    assert 'generator.safetensors' not in files_of(hub, 'org/race')
