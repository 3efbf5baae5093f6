"""The report of a model directory: its data, its text, and its script in a browser."""
import ast
import copy
import html.parser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.devices import device_of
from support.memory import allocated_bytes
from support.networks import tiny_supernet

import timm_shiftnas as tsn
from timm_shiftnas.evaluation import write_budgets_csv
from timm_shiftnas.evaluation.report import MARK
from timm_shiftnas.hub.load import SavedModel
from timm_shiftnas.hub.push import published_files
from timm_shiftnas.hub.report import model_report
from timm_shiftnas.hub.save import save_searched
from timm_shiftnas.models import static_counts
from timm_shiftnas.space import MACS, SIZES
from timm_shiftnas.utils.units import format_count, format_quantity
from timm_shiftnas_cli import main

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
HOSTILE = '</script><script>document.title = "x"</script><!--<b>&amp;"\'{{data}}'
VOID = {'meta', 'input'}


class Page(html.parser.HTMLParser):
    """The scripts, the text and the tags of a page, whose tags have to be balanced."""

    def __init__(self, content):
        super().__init__()
        self.scripts, self.texts, self.tags, self.open = [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'script':
            self.scripts.append('')
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ['script']:
            self.scripts[-1] += data
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def data(self):
        return json.loads(self.scripts[0])


class Model(NamedTuple):
    """A saved supernet with four evaluated subnets, the third of which is not the one for its budget."""
    folder: Path
    net: Any
    rows: list

    def page(self):
        return Page(model_report(SavedModel(self.folder)))


def row(net, name, arch, top1, budget=None):
    return dict(name=name, budget=budget, macs=net.macs(arch), params=net.params(arch), top1=top1, top5=99.,
                arch=arch.to_dict())


def save(folder, name):
    net = tiny_supernet(name)
    generator, (low, high) = tsn.ArchitectureGenerator(net.space).fit(20, progress=False), MACS.range(net.space)
    middle, space = (low + high) / 2, net.space
    rows = [row(net, 'smallest', space.smallest, 61.25), row(net, HOSTILE, generator.propose(middle), 72.5, middle),
            row(net, 'group 2', space.smallest, 71.125, middle), row(net, 'largest', space.largest, 80.)]
    tsn.save_pretrained(
        folder, net, generator, groups=[low, middle, high], probabilities=[.25, .75], results=rows,
        devices=[device_of(space)])
    return Model(folder, net, rows)


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    return save(tmp_path_factory.mktemp('vit') / HOSTILE.replace('/', ''), 'test_shiftformer_supernet')


@pytest.fixture(scope='module')
def cnn(tmp_path_factory):
    return save(tmp_path_factory.mktemp('cnn') / 'model', 'test_shiftmobilenet_supernet')


@pytest.fixture
def copied(vit, tmp_path):
    """A model that may be changed."""
    return vit._replace(folder=Path(shutil.copytree(vit.folder, tmp_path / 'model')))


@pytest.mark.slow
@pytest.mark.parametrize('family', ['vit', 'cnn'])
def test_the_data_are_the_results_and_every_number_is_counted_on_the_subnet(family, request):
    model = request.getfixturevalue(family)
    page, space = model.page(), model.net.space
    assert [resource['label'] for resource in page.data['resources']] == [
        'MACs', 'parameters', 'weights in fp32', 'weights in fp16', 'weights in int8', 'peak memory', 'latency on toy']
    for subnet, given in zip(page.data['subnets'], model.rows, strict=True):
        arch = space.from_dict(given['arch'])
        static = tsn.extract(model.net, arch).eval()
        macs, params = static_counts(static)
        memory = allocated_bytes(static, torch.randn(1, *static.pretrained_cfg['input_size'])).peak
        size, half = (
            sum(x.nbytes for x in each.state_dict().values()) for each in (static, copy.deepcopy(static).half()))
        seconds = (1e-3 + 1e-12 * macs) / .98  # the prices of `device_of`, and its error
        counts = [macs, params, size, half, SIZES['int8'].count(space, arch), memory, seconds]
        assert subnet['counts'] == pytest.approx(counts, rel=1e-12)
        assert subnet['texts'] == [
            *map(format_count, counts[:2]), *(format_quantity(each, 'bytes') for each in counts[2:6]),
            format_quantity(seconds, 'seconds')]
        assert (subnet['name'], subnet['score']) == (given['name'], given['top1'])
        assert subnet['scores'] == [f'{given["top1"]:.2f}', '99.00']
        for text in (*subnet['texts'], given['name'], f'{given["top1"]:.2f}%'):  # in the table, too
            assert text in page.texts
    assert [text for text in page.texts if text in ('0.2500', '0.7500')] == ['0.2500', '0.7500']


@pytest.mark.parametrize('family', ['vit', 'cnn'])
def test_layers_are_those_of_the_arch(family, request):
    model = request.getfixturevalue(family)
    data = model.page().data
    for subnet, given in zip(data['subnets'], model.rows, strict=True):
        shown = {}
        for field in data['fields']:
            values = [subnet['values'][i] for i in field['choices']]
            shown[field['name']] = [x for x in values if x is not None] if field['layered'] else values[0]
        assert shown == given['arch']


@pytest.mark.slow
def test_what_to_type_gives_exactly_this_subnet(vit, tmp_path, capsys):
    for subnet, given, kind in zip(vit.page().data['subnets'], vit.rows, ('flops', 'flops', 'arch', 'flops')):
        python, shell = subnet['lines']
        call = ast.parse(python).body[0].value
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert ast.unparse(call.func) == 'tsn.from_pretrained' and list(options) == [kind]
        assert tsn.from_pretrained(ast.literal_eval(call.args[0]), **options).arch.to_dict() == given['arch']
        program, *argv = shlex.split(shell)
        assert program == 'timm-shiftnas' and argv[-2:] == ['--output', 'subnet']
        assert main([*argv[:-1], str(tmp_path / 'subnet'), '--overwrite']) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == given['arch']


def test_names_cannot_become_tags(vit):
    page = vit.page()
    assert len(page.scripts) == 2 and ('b', {}) not in page.tags and HOSTILE in page.texts
    assert page.data['subnets'][1]['name'] == HOSTILE
    assert '<' not in page.scripts[0] and HOSTILE.replace('/', '')[:30] in page.data['subnets'][0]['lines'][0]


def test_nothing_is_fetched(vit):
    content = model_report(SavedModel(vit.folder))
    assert not {'src', 'href'} & {name for _, attributes in Page(content).tags for name in attributes}
    assert re.findall(r'https?://[^\s\'"]*', content) == ['http://www.w3.org/2000/svg']  # the name of SVG
    assert '@import' not in content and 'url(' not in content and "default-src 'none'" in content


def test_a_search_is_a_series_of_its_own(copied, capsys):
    model, net, _ = copied
    low, high = net.space.smallest, net.space.largest
    save_searched(SavedModel(model), [high])
    (model / 'search').mkdir()
    write_budgets_csv(model / 'search' / 'front.csv', [row(net, 'arch 1', low, 60.), row(net, 'arch 2', high, 90.)])
    assert main(['report', str(model)]) == 0
    assert str(model / 'report.html') in capsys.readouterr().out
    content = (model / 'report.html').read_text(encoding='utf-8')
    found = [subnet for subnet in Page(content).data['subnets'] if subnet['series'] == 'search']
    assert [(subnet['name'], subnet['score']) for subnet in found] == [('arch 2', 90.)]  # the other one is not stored
    assert 'arch 2 (search)' in Page(content).texts
    (model / 'search' / 'front.csv').write_text('name\nx\n')
    assert main(['report', str(model)]) == 2 and 'front.csv' in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_replaces_reports_and_no_other_file(copied, tmp_path, capsys):
    model = copied.folder
    (tmp_path / 'summary.csv').write_text('epoch\n')  # a run: its report is beside the model
    before = {path.name for path in model.iterdir()}
    assert main(['report', str(model)]) == main(['report', str(model)]) == 0
    assert MARK in (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert {path.name for path in model.iterdir()} == before
    (tmp_path / 'mine.html').write_text('mine')
    assert main(['report', str(model), '--output', str(tmp_path / 'mine.html')]) == 2
    assert (tmp_path / 'mine.html').read_text() == 'mine' and 'mine.html' in capsys.readouterr().err
    assert main(['report', str(model), '--output', str(tmp_path / 'new' / 'x.html')]) == 0


@pytest.mark.slow
def test_models_without_results_and_subnets_have_a_report(cnn, tmp_path):
    net = cnn.net
    tsn.save_pretrained(tmp_path / 'supernet', net)
    subnets = Page(model_report(SavedModel(tmp_path / 'supernet'))).data['subnets']
    assert [(subnet['name'], subnet['score']) for subnet in subnets] == [('smallest', None), ('largest', None)]
    assert all('arch=' in subnet['lines'][0] for subnet in subnets)
    tsn.save_pretrained(tmp_path / 'subnet', tsn.extract(net, net.space.largest))
    subnet, = Page(model_report(SavedModel(tmp_path / 'subnet'))).data['subnets']
    assert subnet['counts'][0] == net.macs(net.space.largest) and len(subnet['lines']) == 1


@pytest.mark.slow
def test_the_report_is_published_with_the_name_of_the_repository(cnn):
    content = published_files(SavedModel(cnn.folder), 'me/x', None, None)['report.html'].decode()
    assert str(cnn.folder) not in content
    for subnet in Page(content).data['subnets']:
        line, = subnet['lines']
        assert line.startswith("net = tsn.from_pretrained('me/x', ")


# -- in a browser ------------------------------------------------------------------------------------------------------


MOVE = '''<script>
const slider = document.getElementById('slider'), axis = document.getElementById('axis');
axis.value = 6;
axis.dispatchEvent(new Event('change'));
slider.value = 3;
slider.dispatchEvent(new Event('input'));
</script>'''
ERRORS = '''<script>addEventListener('error', event => { document.documentElement.dataset.error = event.message; })
addEventListener('securitypolicyviolation', event => { document.documentElement.dataset.error = event.blockedURI; })
</script>'''


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium or Chrome')
@pytest.mark.parametrize('moved', [False, True])
def test_the_slider_shows_a_subnet_in_chromium(vit, tmp_path, moved):
    content, rows, net = model_report(SavedModel(vit.folder)).replace('<head>', f'<head>{ERRORS}'), vit.rows, vit.net
    path = tmp_path / 'report.html'
    path.write_text(content.replace('</body>', f'{MOVE * moved}</body>'), encoding='utf-8')
    done = subprocess.run(
        [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / "profile"}',
         '--dump-dom', path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert 'data-error' not in done.stdout
    page, chosen = Page(re.sub('<(/?)svg', r'<\1div', done.stdout)), rows[-1 if moved else 0]
    static = tsn.extract(net, net.space.from_dict(chosen['arch']))
    named = [text for text in page.texts if text.startswith(f'{chosen["name"]} · ')]
    latency = device_of(net.space).resource(net.space)
    need = f'{latency.format(latency.count(net.space, static.arch))} latency on toy' if moved else (
        f'{format_count(static_counts(static)[0])} MACs')
    assert named == [f'{chosen["name"]} · {need} · {chosen["top1"]:.2f}% top-1 accuracy']
    bars = [attributes for _, attributes in page.tags if attributes.get('class') == 'bar']
    per_layer = sum(len(value) for value in chosen['arch'].values() if isinstance(value, list))
    assert len(bars) == per_layer + 2  # and those of P
    circles = [attributes for tag, attributes in page.tags if tag == 'circle']
    assert sorted(circle['class'] for circle in circles) == ['chosen', *['results'] * 4]
