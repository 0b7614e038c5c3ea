"""One self-contained HTML page about runs of train.py: look instead of read.

python report.py                          # the newest run, and a table of all runs under out/
python report.py --out_dir=out/verdict --compare out/b out/c    # more runs in the same pictures

In a notebook, after `%matplotlib inline`, the pictures are matplotlib figures:
plot_curve({"mine": train.main(cfg)["history"]}), plot_attention(attention(model, ids, 0), texts).
"""

import contextlib
import html
import io
import math
import re
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from configurator import load


@dataclass
class Config:
    """Write report.html: curves, samples, how sure the model is, attention, settings."""

    out_dir: str | None = None  # a run of train.py; None: the newest under out/, and a table of all
    compare: tuple[str, ...] = ()  # more runs, in the same pictures
    checkpoint: str = "auto"  # newest, best, a checkpoint-...'s name; auto: best if clearly better
    out: str | None = None  # the page; None: report.html in out_dir
    start: str | None = None  # the prompt of the coloured text, or FILE:path; None: the run's own
    tokens: int = 120  # length of that text, prompt included; at most block_size + 1
    temperature: float = 0.8  # it is drawn at; 0: greedy
    layer: int = -1  # the layer whose attention is drawn, from 0; -1: the last one
    head: int = 0  # its head that is drawn large, from 0
    RETIRED: ClassVar = {"run": "--out_dir"}


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import matplotlib
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import prepare
import runtime
import sample
import train
from model import rotate
from runtime import UserError, check_range, log_curve, print0
from sample import read_prompt

CURVES = {"loss": "loss (nats per token)", "lr": "learning rate",
          "grad_norm": "gradient norm", "tokens_per_s": "tokens per second"}
DRAWING = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "grid.alpha": 0.3,
           "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.1}
SHORT = ("script", "iter", "val_loss", "best_val_loss", "started", "seconds")  # in a list of runs
esc = html.escape  # quotes too: the result may stand in an attribute

# ---------------------------------------------------------------------------------------------
# what a run holds


def read_info(folder):
    """(the newest run.json of a run of any script, {} where there is none, the rows of log.csv)."""
    found, log = [], []
    for place in (*runtime.checkpoints(folder), folder / "best", folder):
        with contextlib.suppress(OSError, ValueError):  # damaged: an older one will do
            found.append(runtime.read_run(place))
    found = [info for info in found if info.keys() & {"script", "train"}]  # no model's config.json
    info = max(found, key=lambda info: info.get("iter", 0), default={})
    with contextlib.suppress(OSError, ValueError):
        log = runtime.read_log(folder / "log.csv")
    for name in ("iter", "tokens", "val_loss", "tokens_per_s"):
        if name not in info and log_curve(log, name)[1]:
            info[name] = log_curve(log, name)[1][-1]
    if info:
        info.setdefault("script", "train.py" if "train" in info else "another script")
    return info, log


def show_info(info):
    """{name: text} of a run.json, its nested parts and what is empty left out."""
    facts = {}
    for name, value in info.items():
        if isinstance(value, float):  # so are the iterations of log.csv
            facts[name] = f"{value:,.{3 if value < 100 and value % 1 else 0}f}"
        elif value and not isinstance(value, dict):
            facts[name] = value
    if "seconds" in facts:
        facts["seconds"] = runtime.clock_text(info["seconds"])
    return facts


def open_run(folder=None, checkpoint="auto"):
    """A run as a dict: info, log, samples, facts, a checkpoint's model. folder None: the newest
    under out/. Raises UserError where there is none, or another script's."""
    folder = Path(folder or sample.newest_run())
    info, log = read_info(folder)
    if info and info["script"] != "train.py":
        raise UserError(f"{folder} is a run of {info['script']}, and the page is about runs of "
                        f"train.py; its curves are in {folder / 'loss.png'}")
    place = sample.pick_checkpoint(folder, checkpoint)
    model, tokenizer, saved = sample.load_checkpoint(place)
    meta = prepare.read_meta(place)
    facts = show_info(info) | {"data": meta["source"], **info.get("machine", {}),
                               "parameters": f"{model.count_parameters():,}"}
    if None not in (info.get("val_loss"), info.get("train_loss")):
        facts["at the end"] = train.describe_losses(info, meta)
    return {"name": folder.as_posix(), "folder": folder, "log": log, "info": info, "facts": facts,
            "samples": train.read_samples(folder / "samples.md"), "model": model,
            "tokenizer": tokenizer, "checkpoint": f"{place.name} (iteration {saved['iter']:,})"}


@torch.no_grad()
def attention(model, ids, layer):
    """Attention weights (nh, T, T) of a layer over `ids`: row i says where token i looks. Hooks
    take the queries and keys from the layer itself, and the rotation that it was given."""
    block = model.transformer.h[layer].attn
    seen = {}
    hooks = [block.register_forward_pre_hook(lambda module, x: seen.update(rotation=x[1])),
             block.q_norm.register_forward_hook(lambda module, x, q: seen.update(q=q[0])),
             block.k_norm.register_forward_hook(lambda module, x, k: seen.update(k=k[0]))]
    try:
        model.hidden(torch.as_tensor(ids)[None])
    finally:
        for hook in hooks:
            hook.remove()
    q, k = seen["q"], seen["k"]  # (nh, T, hs), (nkv, T, hs)
    if seen["rotation"] is not None:
        q, k = rotate(q, *seen["rotation"]), rotate(k, *seen["rotation"])
    k = k.repeat_interleave(len(q) // len(k), dim=0)  # grouped heads share keys
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (nh, T, T)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


# ---------------------------------------------------------------------------------------------
# pictures


@matplotlib.rc_context(DRAWING)
def plot_curve(logs, column="loss", resumed=()):
    """A Figure of a column of `logs`, {name: rows of log.csv}, against iterations; "loss" has the
    evaluations too, train dashed, the best validation starred. resumed: iterations to mark."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="iteration", ylabel=CURVES.get(column, column))
    for i, (name, rows) in enumerate(logs.items()):
        color = f"C{i}"
        axes.plot(*log_curve(rows, column), color=color, alpha=0.4 if column == "loss" else 1)
        if column == "loss":
            x, y = log_curve(rows, "val_loss")
            axes.plot(*log_curve(rows, "train_loss"), ".--", color=color)
            best, at = min(zip(y, x, strict=True), default=(math.nan, 0))
            axes.plot(x, y, ".-", color=color,
                      label=f"{name}: best {best:.3f} at {at:,.0f}" if y else name)
            axes.plot(at, best, "*", color=color, markersize=11)
    for iteration in resumed:
        axes.axvline(iteration, color="gray", linestyle=":")
    if column == "loss":
        figure.legend(loc="outside upper left", frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.9g}")
    axes.grid()
    return figure


@matplotlib.rc_context(DRAWING)
def plot_attention(weights, texts, head=0):
    """A Figure of attention weights (nh, T, T) over tokens of `texts`: all heads small, `head`
    large. A row a token, a column a token that it looks back at; the future stays empty."""
    names = [text.replace("\n", "⏎").replace(" ", "·")[:11] or "…" for text in texts]
    weights = weights.where(torch.ones_like(weights).tril() > 0, torch.nan).numpy()
    columns = min(8, len(weights))
    rows = math.ceil(len(weights) / columns)
    figure = Figure(figsize=(7, rows + 6.2), layout="constrained")
    small, large = figure.subfigures(2, 1, height_ratios=[rows, 6.2])
    look = {"norm": PowerNorm(0.5, 0, 1), "interpolation": "none"}
    for i, axes in enumerate(small.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if i < len(weights):
            axes.imshow(weights[i], **look)
            axes.set_title(f"head {i}", color="C1" if i == head else "black")
    axes = large.subplots()
    axes.spines[:].set_visible(False)
    image = axes.imshow(weights[head], **look)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    large.colorbar(image, shrink=0.8, label=f"weights of head {head} (square-root scale)")
    return figure


def svg(figure):
    """`figure` as inline SVG; what is black in it takes the colour of the page's text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(DRAWING), warnings.catch_warnings():
        # matplotlib's own font may lack a character; the text stays text, the browser has one
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True)
    text = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue())
    return f"<div>{text.replace('#000000', 'currentColor')}</div>"


# ---------------------------------------------------------------------------------------------
# HTML


def pieces(tokenizer, ids):
    """The text that each token adds; '' where a token only begins or goes on with a character."""
    shown = [tokenizer.decode(ids[:i]).rstrip("\ufffd") for i in range(len(ids) + 1)]
    return [text[len(before) :] for before, text in zip(shown, shown[1:], strict=False)]


def coloured(run, cfg):
    """(HTML, token ids) of a text the model writes, each token coloured by its improbability."""
    model, tokenizer = run["model"], run["tokenizer"]
    block_size = model.config.block_size
    start = run["info"]["train"].get("sample_start") or "" if cfg.start is None else cfg.start
    prompt = sample.encode_prompt(model, tokenizer, start)[:block_size]
    new = max(0, min(cfg.tokens, block_size + 1) - len(prompt))
    ids = sample.generate(model, torch.tensor([prompt]), new, cfg.temperature,
                          generator=torch.Generator().manual_seed(1337))[0]
    with torch.no_grad():
        probabilities = model(ids[None, :block_size])[0][0].float().softmax(-1)  # (T, V)
    texts = pieces(tokenizer, ids.tolist())
    spans = [f"<u>{esc(texts[0])}</u>"]
    for i, row in enumerate(probabilities[: len(ids) - 1], start=1):
        p = row[ids[i]].item()
        likeliest = f"{tokenizer.decode([row.argmax()])!r} {row.max():.4f}"
        hint = f"{texts[i]!r}: probability {p:.4f}; likeliest {likeliest}"
        # per cent of colour: 0 where p is 1, 75 (the text stays readable) at 1/1000 and below
        color = round(75 * min(1, -math.log(max(p, 1e-9)) / math.log(1000)))
        tag = "u" if i < len(prompt) else "span"
        spans.append(f'<{tag} data-p="{p:.6f}" style="--s:{color}%" title="{esc(hint)}">'
                     f"{esc(texts[i])}</{tag}>")
    return f'<pre dir="auto">{"".join(spans)}</pre>', ids


def samples(run):
    """Up to eight texts, evenly spread over the run, with the validation loss of their moment."""
    losses = dict(zip(*log_curve(run["log"], "val_loss"), strict=True))
    last = len(run["samples"]) - 1
    parts = []
    for i in sorted({round(last * j / 7) for j in range(8) if last >= 0}):
        iteration, _, text = run["samples"][i].groups()
        loss = losses.get(int(iteration), math.nan)
        parts.append(f"<details{' open' if i in (0, last) else ''}><summary>iteration {iteration}, "
                     f'val loss {loss:.3f}</summary><pre dir="auto">{esc(text)}</pre></details>')
    return "".join(parts) or "<p>This run wrote no samples.</p>"


def about_model(run, cfg):
    """Samples, a coloured text and attention of one run as HTML."""
    text, ids = coloured(run, cfg)
    ids = ids[: min(32, run["model"].config.block_size)]  # as many as one can read
    picture = plot_attention(attention(run["model"], ids, cfg.layer),
                             pieces(run["tokenizer"], ids.tolist()), cfg.head)
    layers = run["model"].config.n_layer
    return f"""<section><h2>{esc(run["name"])}: what it wrote while it learnt</h2>{samples(run)}
<h2>How sure it is</h2><p>By {esc(run["checkpoint"])} at temperature {cfg.temperature:g}. The
stronger the colour, the less probable the model found the token: none for a certain one, full for
1 in 1000. Point at one for its probability. Underlined: the prompt.</p>{text}
<h2>Where the heads look</h2><p>Layer {cfg.layer % layers} of 0 to {layers - 1}, the first
{len(ids)} tokens of that text: a row is a token, its weights over the tokens so far sum to 1;
--layer and --head choose.</p>{svg(picture)}</section>"""


def table(columns, names):
    """{heading: {name: value}} as an HTML table with a row for each of `names`; rows that differ
    are marked. URLs lose what may be secret: user, password and query."""
    body = "".join(f"<td>{esc(heading)}</td>" for heading in ("", *columns))
    for name in names:
        cells = [str(part.get(name, "–")) for part in columns.values()]
        cells = [re.sub(r"(\w{2,}://)(?:[^\s/?#]*@)?([^\s?#]*)\S*", r"\1\2", c) for c in cells]
        body += f'<tr class="{"differs" if len(set(cells)) > 1 else ""}"><td>{esc(name)}</td>'
        body += "".join(f"<td>{esc(cell)}</td>" for cell in cells)
    return f"<div><table>{body}</table></div>"


def page(runs, others, cfg):
    """The whole document. others: {name: facts} of all runs, or {}."""
    title = esc(", ".join(run["name"] for run in runs))
    logs = {run["name"]: run["log"] for run in runs}
    resumed = [iteration for run in runs for iteration in run["info"].get("resumed", ())]
    curves = "".join(svg(plot_curve(logs, column, resumed)) for column in CURVES)
    settings = {run["name"]: run["info"]["train"] for run in runs}
    defaults = asdict(train.Config())
    names = dict.fromkeys(name for part in settings.values() for name in part)
    changed = [n for n in names if any(s.get(n) != defaults.get(n) for s in settings.values())]
    short = {name: {run: facts.get(name, "–") for run, facts in others.items()} for name in SHORT}
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{table({run["name"]: run["facts"] for run in runs}, runs[0]["facts"])}
<h2>Curves</h2><p>Pale: each logged iteration. At evaluations, dashed: the training split; solid:
validation, its best starred. Dotted, upright: the run was resumed.</p>
<div class="grid">{curves}</div>
<div class="grid">{"".join(about_model(run, cfg) for run in runs)}</div>
<h2>Settings that were given, or chosen for the data</h2><main>{table(settings, changed)}</main>
<details><summary>Settings left at their defaults</summary>
{table(settings, [name for name in names if name not in changed])}</details>
{f"<h2>All runs</h2>{table(short, others)}" if others else ""}</body></html>
"""


STYLE = """
:root { color-scheme: light dark; --mark: light-dark(#c4500b, #ff9a52); }
body { max-width: 1060px; margin: auto; padding: 1em; font: 15px/1.5 system-ui, sans-serif; }
body, td + td { overflow-wrap: anywhere; }
.grid { display: grid; gap: 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
section { min-width: 0; } section svg { min-width: 440px; }
svg { width: 100%; height: auto; max-width: 760px; } div { overflow-x: auto; }
svg text { fill: currentColor; font-family: system-ui, sans-serif !important; }
pre { white-space: pre-wrap; } u { text-decoration: underline dotted; }
span { background: color-mix(in srgb, var(--mark) var(--s), transparent); }
main .differs { color: var(--mark); }
table { overflow-wrap: normal; } td { vertical-align: top; padding: 3px 14px 3px 0; }
td + td { min-width: 11em; }
"""


def main(cfg):
    """Write the page and return its path."""
    check_range(cfg, 1, "tokens")
    check_range(cfg, 0, "temperature", "head")
    if cfg.start is not None:  # once: a pipe can be read once
        cfg = replace(cfg, start=read_prompt(cfg.start))
    runs = [open_run(folder, cfg.checkpoint) for folder in (cfg.out_dir, *cfg.compare)]
    for run in runs:
        c = run["model"].config
        if not (-c.n_layer <= cfg.layer < c.n_layer and cfg.head < c.n_head):
            raise UserError(f"--layer {cfg.layer} --head {cfg.head}: {run['name']} has layers 0 "
                            f"to {c.n_layer - 1} and heads 0 to {c.n_head - 1}", 2)
    others = {}
    for folder in [] if cfg.out_dir else sorted(Path("out").glob("*/")):
        if facts := show_info(read_info(folder)[0]):
            others[folder.as_posix()] = facts
    for run, facts in others.items():
        print0(f"{run}:", ", ".join(f"{name} {facts.get(name, '–')}" for name in SHORT))
    out = Path(cfg.out) if cfg.out else runs[0]["folder"] / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it", 2)
    text = page(runs, others, cfg)
    with runtime.disk_errors(out.parent):
        runtime.write_text(out, text)
    print0(f"wrote {out} ({len(text) / 1e3:,.0f} kB); open it in a browser")
    return out


if __name__ == "__main__":
    runtime.run_script(main, CFG)
