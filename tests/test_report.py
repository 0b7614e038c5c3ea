"""report.py: the page shows the run's own numbers, asks nobody for anything, and opens."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import prepare
import report
import runtime
import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NASTY = '<script src="https://example.com/x.js">&"\'</script>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny runs, out/a and out/b<i>, of text full of markup; the folder they lie in."""
    folder = tmp_path_factory.mktemp("report")
    text = Path(json.__file__).read_text("utf-8") + NASTY * 100
    (folder / "text.txt").write_text(text, encoding="utf-8")
    source, data = str(folder / "text.txt"), str(folder / "data")
    prepare.main(prepare.Config("tiny", source=source, tokenizer="char", data_dir=data))
    for name, seed in (("a", 1), ("b<i>", 2)):
        train.main(train.Config(
            dataset="tiny", data_dir=data, out_dir=str(folder / "out" / name), seed=seed,
            block_size=32, n_layer=2, n_head=2, n_embd=32, batch_size=4, max_iters=12,
            warmup_iters=2, eval_interval=4, eval_iters=1, log_interval=1, sample_tokens=20,
            sample_start=NASTY[:8], mixed_precision="no"))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """The page of out/a beside out/b<i>."""
    cfg = report.Config(run=str(folder / "out/a"), compare=str(folder / "out/b<i>"), tokens=30)
    return report.main(cfg).read_text("utf-8")


def test_nothing_from_outside(page):
    """The page asks another machine for a script, a font or a picture, or runs a script."""
    ours = " ".join(re.findall(r"(?s)<style.*?</style>|<[^>]+>", page))  # all but text ...
    assert "//" not in re.sub(r'title="[^"]*"', "", ours)  # ... and what hovers
    assert not re.search(r"(?i)<(script|link|img|iframe|object)|@import|url\(", page)
    assert not re.search(r"""(?i)\s(on\w+|src|href)\s*=\s*["']""", page)


def test_text_is_escaped(page, folder):
    """A run's text was taken for markup."""
    assert NASTY[:8] not in page and html.escape(NASTY[:8]) in page
    assert "b<i>" not in page and "b&lt;i&gt;" in page


def test_curves_are_the_log(page, folder):
    """A curve lost points, or draws another column."""
    for run, label in (("a", "a: "), ("b<i>", "b&lt;i&gt;: ")):
        rows = runtime.read_log(folder / "out" / run / "log.csv")
        for name, column in (("each logged iteration", "loss"), ("validation", "val_loss"),
                             ("learning rate", "lr"), ("gradient norm", "grad_norm"),
                             ("throughput", "tokens_per_s")):  # fmt: skip
            drawn = re.search(f'data-curve="[^"]*{label}{name}" points="([^"]*)"', page)[1].split()
            logged = [r[column] for r in rows if r[column] is not None]
            assert len(drawn) == len(logged) > 3, (run, column)
            heights = [-float(p.split(",")[1]) for p in drawn]
            order = sorted(range(len(logged)), key=lambda i: logged[i])
            assert all(heights[i] <= heights[j] for i, j in zip(order, order[1:], strict=False))


def test_log_scale_and_holes():
    """Values that a logarithm or a pixel cannot take ended the report."""
    points = [(0, None), (1, math.nan), (2, math.inf), (3, 0.0), (4, 1.0), (5, 100.0)]
    drawn = report.chart("x", [("y", "a", points)], log_scale=True)
    assert 'points="46.0,200.0 450.0,14.0"' in drawn and ">10</text>" in drawn
    assert "nothing was logged" in report.chart("x", [("y", "a", points[:3])])
    assert report.chart("x", [("y", "a", [(7, 3.0)])]).count("<circle") == 1
    assert "nan" not in report.chart("x", [("y", "a", [(0, 0.0), (1, 0.0)])])


def test_probabilities_are_the_softmax(folder):
    """A token is shown with another token's probability, or one at another temperature."""
    run = report.open_run(folder / "out/a")
    text, ids = report.coloured(run, report.Config(tokens=32))
    shown = [float(p) for p in re.findall(r'data-p="([\d.]+)"', text)]
    logits = run["model"](torch.tensor([ids]))[0][0]
    expected = logits.softmax(-1)[torch.arange(31), torch.tensor(ids[1:])]
    assert len(ids) == 32 and torch.allclose(torch.tensor(shown), expected, atol=2e-6)
    plain = html.unescape(re.sub(r"<[^>]*>", "", text))
    assert plain == run["tokenizer"].decode(ids)


def test_attention_is_the_models(folder):
    """The heat map is of another head, looks into the future, or its rows do not sum to 1."""
    run = report.open_run(folder / "out/a")
    model, ids = run["model"], run["tokenizer"].encode('"""JSON decoder')
    block, outputs = model.transformer.h[1].attn, []
    block.register_forward_hook(lambda module, x, y: outputs.extend((x[0], y)))
    weights = [report.attention(model, ids, 1, head) for head in range(2)]
    for w in weights:
        assert torch.allclose(w.sum(-1), torch.ones(len(ids)), atol=1e-6)
        assert not w.triu(1).any()
    v = block.c_attn(outputs[0])[0, :, 64:].view(len(ids), 2, 16)  # (T, nh, hs)
    heads = torch.cat([w @ v[:, i] for i, w in enumerate(weights)], dim=-1)
    assert torch.allclose(block.c_proj(heads), outputs[1][0], atol=1e-5)
    drawn = report.heat_map(weights[0], report.pieces(run["tokenizer"], ids))
    cells = [float(w) for w in re.findall(r'data-w="([\d.]+)"', drawn)]
    assert len(cells) == len(ids) * (len(ids) + 1) // 2
    assert sum(cells) == pytest.approx(len(ids), abs=1e-3)


def test_figures_and_machine(page, folder):
    """The page shows other figures than the run reported."""
    info = json.loads((folder / "out/a/checkpoint-000012/config.json").read_text("utf-8"))
    assert f"<b>{info['val_loss']:.3f}</b>" in page
    assert f"<b>{math.exp(info['val_loss']):,.1f}</b>" in page
    assert torch.__version__ in page and html.escape(runtime.machine()["cpu"]) in page
    assert page.count("<summary>iteration") == 4 and "iteration 12, validation loss" in page


def test_newest_run_and_wrong_ones(folder, fails, monkeypatch):
    """The default run is another one; a wrong name ends in a traceback."""
    monkeypatch.chdir(folder)
    out = report.main(report.Config(out="newest.html"))
    assert "<h1>out/b&lt;i&gt;</h1>" in out.read_text("utf-8")
    fails(1, lambda: report.main(report.Config(run="nowhere")), "nowhere", "no checkpoint")
    fails(2, lambda: report.main(report.Config(run="out/a", head=2)), "heads 0 to 1")
    fails(1, lambda: report.main(report.Config(run="out/a", out="no/x.html")), "no")
    monkeypatch.chdir(folder / "out")
    fails(1, lambda: report.main(report.Config()), "python train.py")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1100, 400])
def test_opens_in_a_browser(page, tmp_path, width):
    """The page is blank, is wider than the window, or the browser complains."""
    probe = (
        "<script>console.log('WIDE', document.documentElement.scrollWidth > innerWidth)</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--disable-background-networking", f"--user-data-dir={tmp_path / 'user'}",
               "--enable-logging=stderr", f"--window-size={width},1200"]  # fmt: skip
    command += [f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and '"WIDE false"' in console[0], console
    from matplotlib.image import imread

    picture = imread(tmp_path / "page.png")
    assert picture.shape[:2] == (1200, width)
    assert picture[..., :3].std() > 0.05 and picture[-400:, :, :3].std() > 0.02
