"""Look instead of read: one self-contained HTML page about a run of train.py.

    python report.py                                       # the newest run under out/
    python report.py --run out/verdict --compare out/b     # a second run in the same pictures

Curves, samples, the probability of each token of a text the model writes, one attention head,
figures, configuration and machine. No script and nothing from the network is in the page.
"""

import html
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from configurator import at_least, fail, load


@dataclass
class Config:
    """Write report.html about a run."""

    run: str | None = None  # folder of a run; None: the newest under out/
    compare: str | None = None  # a second run, drawn dashed in the same pictures
    out: str | None = None  # the page; None: report.html in the run's folder
    start: str | None = None  # the prompt of the coloured text; None: the run's sample_start
    tokens: int = 120  # length of the coloured text, prompt included
    temperature: float = 0.8  # it is drawn at; 0: greedy
    seed: int = 1337  # of that text
    layer: int = -1  # block whose attention is drawn; -1: the last one
    head: int = 0  # head of that block
    attention_tokens: int = 32  # length of the text whose attention is drawn


if __name__ == "__main__":
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import torch

import prepare
from model import GPT
from runtime import checkpoints, disk_errors, read_log, say

esc = html.escape  # quotes too: the result may stand in an attribute


# ---------------------------------------------------------------------------------------------
# what is drawn


def open_run(folder):
    """What the page needs of a run, its newest checkpoint opened, as a dict; folder None: the run
    under out/ that was saved last."""
    if folder is None:
        found = [c[0] for f in Path("out").glob("*/") if (c := checkpoints(f))]
        found = [c for c in found if (c / "meta.json").exists()]  # train.py's have one
        if not found:
            fail("no run under out/; train one: python train.py")
        folder = max(found, key=lambda c: c.stat().st_mtime).parent
    folder = Path(folder)
    if not checkpoints(folder):
        fail(f"{folder} holds no checkpoint of train.py; name the folder of a run")
    newest = checkpoints(folder)[0]
    model, tokenizer = GPT.from_checkpoint(newest), prepare.load_tokenizer(newest)
    info, meta = (json.loads((newest / f"{n}.json").read_text("utf-8")) for n in ("config", "meta"))
    return {"name": folder.as_posix(), "folder": folder, "log": read_log(folder / "log.csv"),
            "samples": read_samples(folder / "samples.md"), "info": info, "meta": meta,
            "model": model, "tokenizer": tokenizer}  # fmt: skip


def read_samples(path):
    """[(iteration, text)] of a samples.md; [] without a file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.findall(r"(?ms)^## iteration (\d+)\n\n~~~~\n(.*?)\n~~~~$", text)
    return [(int(iteration), sample) for iteration, sample in found]


@torch.no_grad()
def token_probabilities(model, ids):
    """Softmax over the vocabulary before each of ids[1:], at temperature 1: (len(ids) - 1, V)."""
    return model(torch.tensor([ids]))[0][0, :-1].float().softmax(-1)


@torch.no_grad()
def attention(model, ids, layer, head):
    """Attention weights (T, T) of one head over `ids`: row i says where token i looks."""
    block, seen = model.transformer.h[layer].attn, []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.hidden(torch.tensor([ids]))
    hook.remove()
    q, k, _ = block.c_attn(seen[0])[0].chunk(3, dim=-1)  # (T, C) each
    hs = q.size(-1) // block.n_head
    q, k = (x[:, head * hs : (head + 1) * hs] for x in (q, k))  # (T, hs)
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    return (q @ k.T / math.sqrt(hs)).masked_fill(future, -torch.inf).softmax(-1)


def pieces(tokenizer, ids):
    """The text that each token adds; '' where a token only begins or goes on with a character."""
    texts, shown = [], ""
    for i in range(len(ids)):
        known = [j for j in ids[: i + 1] if j < tokenizer.vocab_size]  # a head can be padded
        text = tokenizer.decode(known).rstrip("\ufffd")  # the rest is to come
        texts.append(text[len(shown) :])
        shown = text
    return texts


def figures(run):
    """[(name, value)] of the final state of a run."""
    info, meta, seen = run["info"], run["meta"], [r for r in run["log"] if r["tokens_per_s"]]
    rows = [("parameters", f"{run['model'].count_parameters():,}"), ("iterations", info["iter"]),
            ("tokens seen", f"{run['log'][-1]['tokens']:,.0f}" if run["log"] else "?")]  # fmt: skip
    for split in ("train", "val"):
        if (loss := info.get(f"{split}_loss")) is not None:
            rows.append((f"{split} loss", f"{loss:.3f}"))
            rows.append((f"{split} perplexity", f"{math.exp(min(loss, 700)):,.1f}"))
    if meta.get("val_bytes") and info.get("val_loss") is not None:
        bits = info["val_loss"] / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
        rows.append(("bits per byte (val)", f"{bits:.3f}"))
    if info.get("best_val_loss") is not None:
        rows.append(("best val loss", f"{info['best_val_loss']:.3f}"))
    if seen:
        rate = statistics.median(r["tokens_per_s"] for r in seen)
        rows.append(("tokens/s (median)", f"{rate:,.0f}"))
    return rows


# ---------------------------------------------------------------------------------------------
# HTML and SVG; colours are CSS variables, so that one page serves light and dark


def chart(title, curves, log_scale=False, from_zero=False):
    """A line chart as <figure>. curves: [(label, css class, [(x, y)])]; y that are None or not
    finite are left out. Points of few-point curves get a dot with its value to hover over."""
    kept = [(label, css, [(x, y) for x, y in points if y is not None and math.isfinite(y)])
            for label, css, points in curves]  # fmt: skip
    kept = [(label, css, [p for p in points if p[1] > 0 or not log_scale])
            for label, css, points in kept]  # fmt: skip
    xs, ys = [[p[i] for _, _, points in kept for p in points] for i in (0, 1)]
    if not xs:
        return f"<figure><figcaption>{esc(title)}</figcaption><p>nothing was logged</p></figure>"
    scale = math.log10 if log_scale else float
    low, high = min([*ys, 0.0] if from_zero else ys), max(ys)
    low, high = (low, high) if high > low else (low * 0.9, low * 1.1 or 1.0)
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(x, y):
        return (46 + 404 * (x - left) / (right - left),
                200 - 186 * (scale(y) - scale(low)) / (scale(high) - scale(low)))  # fmt: skip

    parts = []
    for value in ticks(low, high, log_scale):
        y = place(left, value)[1]
        parts.append(f'<line class="grid" x1="46" x2="450" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="end" x="41" y="{y + 4:.1f}">{short(value)}</text>')  # fmt: skip
    for value in ticks(left, right):
        x = place(value, low)[0]
        parts.append(f'<text class="{"end" if x > 440 else "mid"}" x="{x:.1f}" y="216">'
                     f"{short(value)}</text>")  # fmt: skip
    for label, css, points in kept:
        line = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in points)
        parts.append(f'<polyline class="{css}" data-curve="{esc(label)}" points="{line}"/>')
        for x, y in points if len(points) <= 40 else ():
            cx, cy = place(x, y)
            hint = f"<title>{esc(label)}, iteration {x:.0f}: {y:.5g}</title>"
            parts.append(
                f'<circle class="{css}" cx="{cx:.1f}" cy="{cy:.1f}" r="2.5">{hint}</circle>'
            )
    legend = "".join(f'<span><svg viewBox="0 0 22 8"><line class="{css}" x2="22" y1="4" y2="4"/>'
                     f"</svg>{esc(name)}</span>" for name, css, p in kept if p)  # fmt: skip
    return (f'<figure><figcaption>{esc(title)}</figcaption><div class="legend">{legend}</div>'
            f'<svg viewBox="0 0 460 222" role="img" aria-label="{esc(title)}">{"".join(parts)}'
            "</svg></figure>")  # fmt: skip


def ticks(low, high, log_scale=False):
    """About five round numbers from low to high."""
    if log_scale:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**e for e in tens for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        if len(found) >= 2:
            return found if len(found) <= 7 else [v for v in found if f"{v:e}"[0] == "1"]
    rough = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(number):
    """An axis label: 3 digits that count, k and M for large numbers."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"


def charts(runs):
    """All curves of one or two runs."""

    def curve(name, label, css):
        return [(label if len(runs) == 1 else f"{run['name']}: {label}", f"{css} {style}",
                 [(r["iter"], r[name]) for r in run["log"] if r[name] is not None])
                for run, style in zip(runs, ("first", "second"), strict=False)]  # fmt: skip

    losses = curve("loss", "each logged iteration", "pale") + curve("train_loss", "train", "a")
    losses += curve("val_loss", "validation", "b")
    return "".join((
        chart("loss, nats per token", losses),
        chart("learning rate", curve("lr", "learning rate", "a"), from_zero=True),
        chart("gradient norm", curve("grad_norm", "gradient norm", "a"), log_scale=True),
        chart("tokens per second", curve("tokens_per_s", "throughput", "a"), from_zero=True),
    ))  # fmt: skip


def coloured(run, cfg):
    """A text the model writes, each token on a ground as strong as the token was improbable."""
    model, tokenizer = run["model"], run["tokenizer"]
    start = run["info"]["train"]["sample_start"] if cfg.start is None else cfg.start
    ids = (tokenizer.encode(start) or [tokenizer.eot_id or 0])[: model.config.block_size - 1]
    new = max(0, min(cfg.tokens, model.config.block_size) - len(ids))
    generator = torch.Generator().manual_seed(cfg.seed)
    out = model.generate(torch.tensor([ids]), new, cfg.temperature, generator=generator)[0].tolist()
    texts, probabilities = pieces(tokenizer, out), token_probabilities(model, out)
    spans = [f'<span class="given" title="prompt">{esc(texts[0])}</span>']
    for i in range(1, len(out)):
        row = probabilities[i - 1]
        p, rank = row[out[i]].item(), int((row > row[out[i]]).sum()) + 1
        best = int(row.argmax())
        hint = f"{texts[i]!r}: probability {p:.4f}, rank {rank} of {len(row):,}"
        if rank > 1:
            hint += f"; likeliest {pieces(tokenizer, [best])[0]!r} {row[best]:.4f}"
        kind = "given" if i < len(ids) else "made"
        spans.append(f'<span class="{kind}" data-p="{p:.6f}" style="--s:{strength(p)}%" '
                     f'title="{esc(hint)}">{esc(texts[i])}</span>')  # fmt: skip
    return f'<pre class="tokens">{"".join(spans)}</pre>', out


def strength(p):
    """Per cent of colour for a probability: 0 for 1, 75 (text stays readable) for 1/1000."""
    return round(75 * min(1, -math.log(max(p, 1e-9)) / math.log(1000)))


def heat_map(weights, texts):
    """Attention weights (T, T) as SVG: a row a token, a column a token it may look back at."""
    T, cell, margin = len(texts), 15, 92
    names = [t.replace("\n", "⏎").replace(" ", "·") or "…" for t in texts]
    names = [n if len(n) <= 11 else n[:10] + "…" for n in names]
    parts = []
    for i in range(T):
        middle = margin + cell * i + cell / 2
        parts.append(f'<text class="end" x="{margin - 5}" y="{middle + 4}">{esc(names[i])}</text>'
                     f'<text transform="translate({middle + 4} {margin - 5}) rotate(-90)">'
                     f"{esc(names[i])}</text>")  # fmt: skip
        for j in range(i + 1):
            w = weights[i, j].item()
            parts.append(f'<rect x="{margin + cell * j}" y="{margin + cell * i}" width="{cell - 1}"'
                         f' height="{cell - 1}" data-w="{w:.6f}" style="--s:{math.sqrt(w):.3f}">'
                         f"<title>{esc(f'{texts[i]!r} looks at {texts[j]!r}: {w:.3f}')}"
                         "</title></rect>")  # fmt: skip
    side = margin + cell * T + 4
    return (f'<div class="scroll"><svg class="heat" viewBox="0 0 {side} {side}" width="{side}" '
            f'role="img" aria-label="attention">{"".join(parts)}</svg></div>')  # fmt: skip


def samples(run):
    """Up to eight texts, evenly spread over the run, with the validation loss of their moment."""
    texts = run["samples"]
    picked = sorted({round(i * (len(texts) - 1) / 7) for i in range(8)}) if len(texts) > 8 else None
    losses = {r["iter"]: r["val_loss"] for r in run["log"] if r["val_loss"] is not None}
    parts = []
    for i in picked or range(len(texts)):
        iteration, text = texts[i]
        loss = f", validation loss {losses[iteration]:.3f}" if iteration in losses else ""
        parts.append(f"<details{' open' if i in (0, len(texts) - 1) else ''}><summary>iteration "
                     f"{iteration:,}{loss}</summary><pre>{esc(text)}</pre></details>")  # fmt: skip
    return "".join(parts) or "<p>this run wrote no samples</p>"


def table(head, rows):
    """An HTML table; rows whose cells past the first differ are marked."""
    lines = []
    for name, *values in rows:
        mark = ' class="differs"' if len(set(map(str, values))) > 1 else ""
        cells = "".join(f"<td>{esc(str(v))}</td>" for v in values)
        lines.append(f"<tr{mark}><th>{esc(name)}</th>{cells}</tr>")
    top = "".join(f"<th>{esc(h)}</th>" for h in head)
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def side_by_side(what, parts):
    """The dicts `parts`, one a run, as a table of their joint keys."""

    def show(value):  # quotes only where blanks would hide
        return repr(value) if str(value) != str(value).strip() or value == "" else value

    names = list(dict.fromkeys(k for part in parts for k in part))
    return table(what, [(k, *(show(part.get(k, "–")) for part in parts)) for k in names])


STYLE = """
:root { --ground: #fbfbf9; --card: #ffffff; --ink: #1c1c1a; --soft: #5f5e5a; --line: #e3e2dd;
  --a: #1f66d1; --b: #c4500b; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ground: #161615; --card: #1f1f1d; --ink: #ecebe6;
  --soft: #a3a19a; --line: #363532; --a: #6ea8ff; --b: #ff9a52; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 24px 16px 48px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 36px 0 8px; }
p { color: var(--soft); margin: 4px 0 10px; max-width: 75ch; }
.tiles, .charts { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); margin-top: 16px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.tile, figure, details, .tokens, .scroll { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; margin: 0; padding: 10px 14px; }
.tile { color: var(--soft); font-size: .85rem; }
.tile b { display: block; color: var(--ink); font-size: 1.25rem; font-weight: 600; }
.tile b + b { border-top: 1px dashed var(--soft); }
figcaption { font-weight: 600; }
figure p { margin: 60px 0; text-align: center; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; color: var(--soft); font-size: .8rem;
  overflow-wrap: anywhere; }
.legend svg { width: 22px; height: 8px; margin-right: 5px; }
figure > svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--line); }
polyline, .legend line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .pale { stroke: var(--a); opacity: .4; }
circle.a { fill: var(--a); } circle.b { fill: var(--b); } circle.pale { fill: var(--a); }
polyline.second, .legend line.second { stroke-dasharray: 5 3; }
circle.second { fill: var(--card); }
pre { margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.6 ui-monospace, monospace; }
details { margin-bottom: 8px; } summary { cursor: pointer; font-weight: 600; }
.made, .ramp span { background: color-mix(in srgb, var(--b) var(--s), transparent); }
.made, .given { border-radius: 3px; padding: 2px 0; box-decoration-break: clone; }
.given { color: var(--soft); text-decoration: underline dotted; }
.ramp { display: flex; max-width: 420px; margin: 0 0 8px; font-size: .8rem; }
.ramp span { flex: 1; text-align: center; padding: 2px 4px; }
.scroll { overflow-x: auto; }
.heat { display: block; margin: 0 auto; } .heat rect { fill: var(--a); fill-opacity: var(--s); }
table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line);
  font-weight: 400; vertical-align: top; }
th:first-child { width: min(16em, 25vw); } tr:first-child th { font-weight: 600; }
tr:last-child > * { border-bottom: 0; }
td { font-family: ui-monospace, monospace; } .differs > * { color: var(--b); }
"""


def page(runs, cfg):
    """The whole document."""
    run = runs[0]
    text, ids = coloured(run, cfg)
    few = ids[: cfg.attention_tokens]
    weights = attention(run["model"], few, cfg.layer, cfg.head)
    names, numbers = [r["name"] for r in runs], [dict(figures(r)) for r in runs]
    tiles = "".join(f'<div class="tile">{esc(k)}'
                    + "".join(f"<b>{esc(str(n.get(k, '–')))}</b>" for n in numbers) + "</div>"
                    for k in numbers[0])  # fmt: skip
    ramp = "".join(f'<span style="--s:{strength(p / 100)}%">{p:g} %</span>'
                   for p in (100, 30, 10, 1, 0.1))  # fmt: skip
    unknown, c = {"machine": "not recorded by this run"}, run["model"].config
    both = ". Solid: the first run; dashed: the second" if len(runs) > 1 else ""
    body = f"""<h1>{esc(" and ".join(names))}</h1>
<p>{esc(run["meta"]["source"])}, vocabulary {c.vocab_size:,}, {c.n_layer} blocks of {c.n_head}
heads, width {c.n_embd}, context {c.block_size}{both}</p>
<div class="tiles">{tiles}</div>
<h2>Curves</h2><div class="charts">{charts(runs)}</div>
<h2>What it wrote while it learnt</h2>{samples(run)}
<h2>How sure it was</h2>
<p>A text of the last checkpoint at temperature {cfg.temperature:g}. The stronger the ground, the
less probable the model found the token; point at one for its probability. Underlined: the prompt.
</p><div class="ramp">{ramp}</div>{text}
<h2>Where one head looks</h2>
<p>Block {cfg.layer % c.n_layer + 1} of {c.n_layer}, head {cfg.head + 1} of {c.n_head}, over the
first {len(few)} tokens of that text: each row sums to 1; colour grows with the root of the weight.
</p>{heat_map(weights, pieces(run["tokenizer"], few))}
<h2>Configuration</h2>{side_by_side(["", *names], [r["info"]["train"] for r in runs])}
<h2>Machine</h2>{side_by_side(["", *names], [r["info"].get("machine", unknown) for r in runs])}"""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{esc(names[0])}</title><style>{STYLE}</style></head>"
            f"<body>{body}</body></html>\n")  # fmt: skip


def main(cfg):
    """Write the page and return its path."""
    at_least(cfg, 1, "attention_tokens")
    at_least(cfg, 2, "tokens")
    at_least(cfg, 0, "temperature", "seed", "head")
    runs = [open_run(cfg.run)] + ([open_run(cfg.compare)] if cfg.compare else [])
    c = runs[0]["model"].config
    if not (-c.n_layer <= cfg.layer < c.n_layer and cfg.head < c.n_head):
        fail(f"--layer {cfg.layer} --head {cfg.head}: the model has layers 0 to {c.n_layer - 1} "
             f"and heads 0 to {c.n_head - 1}", 2)  # fmt: skip
    out = Path(cfg.out) if cfg.out else runs[0]["folder"] / "report.html"
    text = page(runs, cfg)
    with disk_errors(out.parent):
        out.write_text(text, encoding="utf-8")
    say(f"wrote {out} ({len(text) / 1e3:,.0f} kB); open it in a browser")
    return out


if __name__ == "__main__":
    main(CFG)
