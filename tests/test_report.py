"""report.py: the page shows the run's own numbers, asks nobody for anything, and opens."""

import html
import json
import math
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.nn import functional as F

import prepare
import report
import runtime
import train
from model import GPT, GPTConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NASTY = '<script src="https://example.com/x.js">&"\'</script>'
TINY = dict(vocab_size=61, block_size=9, n_layer=3, n_head=6, n_embd=24)
LLAMA = dict(rope_theta=10_000.0, rms_norm=True, swiglu=True, bias=False, n_kv_head=2, head_dim=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny runs, out/a and out/b<i>$, of text full of markup; the folder they lie in."""
    folder = tmp_path_factory.mktemp("report")
    text = Path(json.__file__).read_text("utf-8") + NASTY * 100
    (folder / "text.txt").write_text(text, encoding="utf-8")
    data = str(folder / "data")
    prepare.main(prepare.Config(dataset="tiny", source=[str(folder / "text.txt")], tokenizer="char",
                                data_dir=data))
    for name, block_size in (("a", 32), ("b<i>$x$", 1)):
        train.main(train.Config(
            dataset="tiny", data_dir=data, out_dir=str(folder / "out" / name), n_layer=2, n_head=2,
            n_embd=32, block_size=block_size, batch_size=4, max_iters=11, warmup_iters=2,
            eval_interval=4, eval_iters=1, log_interval=1, sample_tokens=20,
            sample_start=NASTY[:8], mixed_precision="no"))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """The page of out/a beside out/b<i>$, whose block_size is 1."""
    cfg = report.Config(out_dir=str(folder / "out/a"), compare=(str(folder / "out/b<i>$x$"),),
                        tokens=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return report.main(cfg).read_text("utf-8")


def test_nothing_from_outside(page):
    """The page asks another machine for a script, a font or a picture, or runs a script; a run's
    text was taken for markup, or the $ of a name for mathematics."""
    tags = " ".join(re.findall(r"(?s)<style.*?</style>|<[^>]+>", page))  # all but text
    tags = re.sub(r'title="[^"]*"|xmlns(:xlink)?="[^"]*"', "", tags)  # what hovers; names of SVG
    assert "//" not in re.sub(r'"data:image/png;base64,[^"]*"', "", tags)
    assert not re.search(r"(?i)<(script|link|iframe|object)|@import|url\((?!#)|\son\w+=", tags)
    assert NASTY[:8] not in page and html.escape(NASTY[:8]) in page
    assert "b<i>" not in page and "b&lt;i&gt;$x$: best" in page


def test_secrets_of_urls_stay_out():
    """A password or a token of a URL can be read in a page that is passed on."""
    command = "--source=https://me:pa@ss@host.org/x.txt?token=1#z --b"
    shown = report.table({"x": {"a": command}}, ["a"])
    assert "https://host.org/x.txt --b" in shown and not re.search("me|pa|ss@|token|#z", shown)


def test_curves_are_the_log(folder):
    """A curve lost points, draws another column, or stars another point than the minimum."""
    rows = runtime.read_log(folder / "out/a/log.csv")
    for column in report.CURVES:
        axes = report.plot_curve({"a": rows}, column, resumed=[3]).axes[0]
        assert axes.get_xlabel() == "iteration" and axes.get_ylabel() == report.CURVES[column]
        assert list(axes.lines[-1].get_xdata()) == [3, 3]
        for name, line in zip((column, "train_loss", "val_loss"), axes.lines[:-1], strict=False):
            points = [(r["iter"], r[name]) for r in rows if r[name] is not None]
            assert len(points) > 3 and line.get_xydata().tolist() == [list(p) for p in points]
    star = report.plot_curve({"a": rows}).axes[0].lines[3].get_ydata()
    assert star == min(r["val_loss"] for r in rows if r["val_loss"])


def test_values_that_cannot_be_drawn():
    """A NaN, an infinity, a single point or an empty log ends the report."""
    rows = [{"iter": i, "loss": value, "val_loss": value}
            for i, value in enumerate((None, math.nan, math.inf, 0.0, 1.0, 50.0))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for log in (rows, rows[:2], rows[4:5], rows[3:4], []):
            assert "<svg" in report.svg(report.plot_curve({"x": log}))


def test_probabilities_are_the_softmax(folder):
    """A token is shown with another token's probability, at another temperature, or as markup."""
    run = report.open_run(folder / "out/a")
    text, ids = report.coloured(run, report.Config(tokens=99, start="a<i>&"))
    shown = torch.tensor([float(p) for p in re.findall(r'data-p="([\d.]+)"', text)])
    expected = run["model"](ids[None, :-1])[0][0].softmax(-1)[torch.arange(32), ids[1:]]
    assert len(ids) == 33 and torch.allclose(shown, expected, atol=2e-6)
    assert html.unescape(re.sub(r"<[^>]*>", "", text)) == run["tokenizer"].decode(ids)


@pytest.mark.parametrize("family", [{}, LLAMA, LLAMA | {"qk_norm": True}],
                         ids=["gpt2", "llama", "qwen3"])
def test_attention_is_the_models(family, monkeypatch):
    """The weights are of another layer, miss the rotation or the norm, share keys wrongly, or look
    into the future."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | family)).eval()
    for p in model.parameters():  # the initial weights are too small to tell heads apart
        p.data.normal_(std=0.5)
    seen = []

    def spy(q, k, v, **options):
        y = F.scaled_dot_product_attention(q, k, v, **options)
        seen.append((v, y))
        return y

    monkeypatch.setattr("model.scaled_dot_product_attention", spy)
    ids = [5, 0, 60, 7, 7, 1, 33]
    for layer in (0, 2, -1):
        weights = report.attention(model, ids, layer)
        v, y = seen[layer % 3 - 3]  # (1, nkv, T, hs), (1, nh, T, hs)
        v = v[0].repeat_interleave(6 // v.size(1), dim=0)
        assert weights.shape == (6, 7, 7) and not weights.triu(1).any()
        assert torch.allclose(weights @ v, y[0], atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    axes = report.plot_attention(weights, list("abc$d$e"), head=3).axes
    pictures = [a.images[0].get_array() for a in axes if a.images]  # six small ones, a large one
    assert len(pictures) == 7 and axes[-1].get_ylabel().startswith("weights of head 3")
    for picture, w in zip(pictures, [*weights, weights[3]], strict=True):
        assert picture.mask.sum() == 21 and torch.equal(torch.tensor(picture.filled(0)), w)


def test_facts_and_settings(page, folder):
    """The page shows other figures than the run reported, or folds a setting that was given."""
    info = runtime.read_run(folder / "out/a/checkpoint-000011")
    opened, folded = page.split("Settings left at their defaults")
    loss = f"{info['val_loss']:.3f}, perplexity {math.exp(info['val_loss']):.1f}"
    given = '<tr class="differs"><td>block_size'
    assert all(words in opened for words in (loss, given, "bits per byte", info["started"]))
    assert "<td>optimizer" in folded and html.escape(info["machine"]["cpu"]) in opened
    assert page.count("<summary>iteration") == 8 and "iteration 11, val loss" in page
    assert page.count('<pre dir="auto">') == 10 and page.count("<svg") == 6


def test_a_newer_best_counts(folder, tmp_path):
    """Of a run that was killed after best/ was saved, the page showed an older checkpoint."""
    for name, info in (("best", {"iter": 300}), ("checkpoint-000120", {"iter": 120}), (".", {})):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "run.json").write_text(json.dumps({"script": "train.py"} | info))
    assert report.read_info(tmp_path)[0]["iter"] == 300


def test_a_prompt_is_read_once(folder, monkeypatch):
    """Beside a second run a prompt from a pipe was empty."""
    read = []
    monkeypatch.setattr(report, "read_prompt", lambda start: read.append(start) or "import")
    runs = [str(folder / "out" / name) for name in ("a", "b<i>$x$")]
    page = report.main(report.Config(runs[0], (runs[1],), start="FILE:p", tokens=9))
    page = page.read_text("utf-8")
    assert read == ["FILE:p"] and page.count("<u>i</u>") == 2


def test_newest_run_and_all_others(folder, fails, monkeypatch, capsys):
    """The default is not the newest run, the table lacks one, or a wrong name ends in a traceback;
    a run with best/ only, a damaged one or another script's stops the page."""
    monkeypatch.chdir(folder)
    (folder / "out/mrpc").mkdir()
    (folder / "out/mrpc/run.json").write_text('{"script": "finetune_mrpc.py", "config": {}}')
    (folder / "out/mrpc/log.csv").write_text("iter,val_loss\n5,0.0\n")
    (folder / "out/broken").mkdir()
    (folder / "out/broken/log.csv").write_text("iter,loss\nx,y\n")
    shutil.copytree(folder / "out/a/best", folder / "out/only/best")
    (folder / "out/seeds/best").mkdir(parents=True)
    (folder / "out/seeds/run.json").write_text('{"script": "finetune_mrpc.py", "seconds": 9}')
    for name in ("seeds/best", "exported"):  # a model's config.json is no run
        (folder / "out" / name).mkdir(exist_ok=True)
        (folder / "out" / name / "config.json").write_text('{"model_type": "bert"}')
    text = report.main(report.Config(out="newest.html")).read_text("utf-8")
    assert "<h1>out/b&lt;i&gt;$x$</h1>" in text and "<td>out/mrpc" in text
    said = capsys.readouterr().out
    assert "out/a: script train.py, iter 11, val_loss" in said
    assert "out/mrpc: script finetune_mrpc.py, iter 5, val_loss 0," in said
    assert "out/seeds: script finetune_mrpc.py" in said and "exported" not in said
    assert "<h1>out/only" in report.main(report.Config(out_dir="out/only")).read_text("utf-8")
    for code, options, words in (
            (1, {"out_dir": "nowhere"}, ["nowhere", "no checkpoint"]),
            (1, {"out_dir": "out/mrpc"}, ["a run of finetune_mrpc.py"]),
            (2, {"out_dir": "out/a", "head": 2}, ["heads 0 to 1"]),
            (2, {"out_dir": "out/a", "layer": -3}, ["layers 0 to 1"]),
            (2, {"out_dir": "out/a", "tokens": 0}, ["--tokens"]),
            (2, {"out_dir": "out/a", "out": "."}, ["--out . is a folder"]),
            (2, {"out_dir": "out/a", "out": "out"}, ["--out out is a folder"]),
            (1, {"out_dir": "out/a", "out": "no/x.html"}, ["cannot write"])):
        fails(code, lambda options=options: report.main(report.Config(**options)), *words)
    (folder / "out/a/.tmp-best").mkdir()  # a run that is writing at this moment
    monkeypatch.setattr(runtime, "write_text", lambda *_: (folder / "gone/x").touch())
    fails(1, lambda: report.main(report.Config(out_dir="out/a")), "cannot write")
    assert (folder / "out/a/.tmp-best").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(folder / "out")
    fails(1, lambda: report.main(report.Config()), "python train.py")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1100, 400])
def test_opens_in_a_browser(page, tmp_path, width):
    """The page is blank, is wider than the window, or the browser complains."""
    probe = "<script>console.log('WIDE', document.documentElement.scrollWidth > innerWidth);"
    page = page.replace("</body>", probe + "</script></body>")
    (tmp_path / "page.html").write_text(page, "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'user'}", "--enable-logging=stderr",
               f"--window-size={width},1200", f"--screenshot={tmp_path / 'page.png'}",
               (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and '"WIDE false"' in console[0], console
    picture = matplotlib.image.imread(tmp_path / "page.png")
    assert picture.shape[:2] == (1200, width)
    assert picture[..., :3].std() > 0.05 and picture[-400:, :, :3].std() > 0.02
