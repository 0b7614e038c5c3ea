"""This project beside what a user would pick instead, on the same work in one run.

    python bench.py                      # all rows but the long ones
    python bench.py sample --json FILE   # or train, prepare, mrpc, roberta
    python bench.py char                 # long: two whole commands in turns; verdict as well
    python bench.py scale                # speed and memory against size: bench.png
    python bench.py quantize --run out/stdlib   # what int8 and bf16 weights cost in quality

Each side is a process of its own (the allocator's setting holds for a process), set up and warmed
before the clock starts; the sides take turns, A B A B, and their medians are compared. The
machine's own limits, a matrix product and a copy, are measured first, in the same run.

What was tried for speed (2 cores, AVX512-BF16), and what was seen:
- bf16 autocast, fused AdamW, glibc's malloc without mmap: 154 to 518 tokens/s (train row); kept
- dropout from 16-bit slices of one 64-bit draw, own softmax: 518 to 605 tokens/s; kept
- F.linear_cross_entropy, chunked, instead of logits: 507 to 86 tokens/s, 3.4 to 3.8 GB; not kept
- a hand-written chunked loss: 507 to 430 tokens/s, 3.42 to 3.39 GB; not kept
- decoding one row: PyTorch's matrix-vector product uses one core (16 GB/s of weights), the same
  with transposed weights 25, numpy's uses all cores, 48; numpy kept
- mmap for blocks of 32 MB and more only: 610 to 530 tokens/s, 3.5 to 3.4 GB; not kept
- huge pages for the weights: no difference; not kept
- one random number a row and a search in the cumulated probabilities instead of multinomial, which
  draws one for each of 50,257 tokens: 482 to 793 tokens/s with 16 samples in bf16; kept
- torch.compile on a CPU (char row): 19.8 to 24.8 thousand tokens/s, 27 s later; off by default
- weights cast to bf16 once an evaluation, not once a batch: 1.45 to 1.25 s (Verdict); kept
- Muon for the matrices: 2.09 to 1.91 bits per byte after 150 iterations of 4,096 tokens; kept
- half the tokens an iteration, twice the iterations: 1.91 to 1.78 bits per byte; kept
- fp32 tensors, only the products inside in bf16 (set_float32_matmul_precision("medium")) instead of
  autocast: 650 to 415 tokens/s; not kept
- scores, scale and mask in one baddbmm; PyTorch's huge pages (THP_MEM_ALLOC_ENABLE): no difference
- a vocabulary of 50,304: the head's weight gradient 60 to 46 ms of an update of 785; not kept, the
  weights would have another shape than the vocabulary
An update of 785 ms (train row) is 472 of products, 92 of AdamW and clipping; the rest is dropout,
attention's softmax and masks, GELU, casts, the loss.

And on an NVIDIA H200 (PyTorch 2.11), GPT-2 124M:
- a decoding step replayed as a CUDA graph: 382 to 1,001 tokens/s; attention of one query by hand
  instead of PyTorch's fused kernel: 1,266; one write into the cache, one mask for all layers: 1,435
- that graph of a compiled step: 1,001 to 1,007 tokens/s, with coordinate descent tuning 1,068, 11
  and 30 s later; not kept
- decoding in bf16: layers that convert 1,054 tokens/s, the whole model in bf16 1,495; kept
- cuDNN's attention asked for: no difference, it is taken by itself
- training on tokens that are all as frequent: 540,000 tokens/s instead of 488,000 (probably as a
  frequent token's embedding gets its gradients one after another); rows use a text's frequencies
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import fail, load

WORK = ("train", "sample", "prepare", "mrpc", "roberta", "all")
WORK += ("char", "verdict", "scale", "quantize")


@dataclass
class Config:
    """Measure this project against its peers."""

    json: str | None = None  # write the table there too
    rounds: int = 5  # turns of each side
    text: str | None = None  # text file for prepare, roberta and char; None: the stdlib preset
    run: str = "out/stdlib"  # a run of train.py, for quantize
    side: str | None = None  # used by the parent process: serve one side's turns


if __name__ == "__main__":
    WHAT = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in WORK else "all"
    CFG = load(Config)  # parse before the slow imports: --help answers at once

import numpy as np
import torch

import prepare
from model import GPT, GPTConfig, pack
from runtime import pick_precision, tune_allocator

# ---------------------------------------------------------------------------------------------
# sides: generators; the first next() sets up and warms, each further one does a turn of work and
# yields its amount


def device():
    """Where the model runs: an NVIDIA GPU or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gemm(dtype):
    """Floating-point operations of a square matrix product, 2,048 wide; on a GPU 8,192."""
    n = 8192 if device().type == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=dtype, device=device()) for _ in range(2))
    while True:
        for _ in range(10):
            a @ b
        yield 10 * 2 * n**3


def copy():
    """Bytes read and written by copying 256 MB, on a GPU 4 GB ten times."""
    times, size = (10, 2**30) if device().type == "cuda" else (1, 2**26)
    a = torch.randn(size, device=device())
    b = torch.empty_like(a)
    while True:
        for _ in range(times):
            b.copy_(a)
        yield times * 2 * a.nbytes


def zipf(vocab_size, *shape):
    """Random tokens of which some are as frequent as in a text: embeddings' gradients notice."""
    return (vocab_size ** torch.rand(shape)).long() - 1


def training(ours, vocab_size=50257, rows=2, micro_batches=1, T=256, dropout=0.1):
    """Tokens of one update of GPT-2 124M: train.py's parts, or transformers' model in the plainest
    fp32 loop; on a GPU both compiled and in bf16, the peer with the settings of nanoGPT."""
    torch.manual_seed(1)
    data = zipf(vocab_size, micro_batches, rows, T + 1).to(device())
    card = device().type == "cuda"
    bf16 = card or (ours and pick_precision("auto", "cpu") == "bf16")
    if ours:
        import train

        tune_allocator()
        model = GPT(GPTConfig(T, vocab_size, dropout=dropout)).to(device()).train()
        options = train.Config(optimizer="adamw", learning_rate=1e-4)
        (optimizer,) = train.make_optimizers(model, options, device())
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        options = {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
        options |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        padded = 50304 if card else vocab_size
        shape = GPT2Config(vocab_size=padded, n_positions=T, **options)
        model = GPT2LMHeadModel(shape).to(device()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=card or None)
    if card:
        model.compile()
    while True:
        for micro in data:
            idx, targets = micro[:, :-1].contiguous(), micro[:, 1:].contiguous()  # (rows, T)
            with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
                if ours:
                    loss = model(idx, targets, return_logits=False)[1]
                else:
                    logits = model(idx).logits.flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield micro_batches * rows * T


def loading():
    """Tokens of batches of 2 x 256, read by train.py from a file of 100 million, with iterations
    past 10 million, as a resumed run starts with."""
    import train

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/train.npy", np.arange(10**8, dtype=np.uint16))
        tokens, it = np.load(f"{folder}/train.npy", mmap_mode="r"), 10**7
        n = train.n_windows(tokens, 256)
        while True:
            for _ in range(100):
                it += 1
                rows = train.windows_of(it, 2, n, 1337)
                train.read_windows(tokens, rows, 256, 2**16, torch.device("cpu"))
            yield 100 * 2 * 256


def starting(ours, text):
    """60 for each process that has come to its first update of an 86M model, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        text = text or prepare.__file__
        prepare.main(prepare.Config("start", str(text), "char", data_dir=folder))
        V = prepare.read_meta(f"{folder}/start")["vocab_size"]
        script = ["-c", f"import bench; next(bench.training(False, {V})); print('iteration 1:')"]
        if ours:
            script = ["train.py", "--dataset=start", f"--data_dir={folder}", "--log_interval=1",
                      "--n_layer=12", "--n_head=12", "--n_embd=768", "--batch_size=2",
                      "--eval_interval=0", "--optimizer=adamw", "--dropout=0.1"]  # fmt: skip
        yield 0
        while True:
            out = [f"--out_dir={tempfile.mkdtemp(dir=folder)}"] if ours else []
            until([sys.executable, *script, *out], "iteration 1:")
            yield 60


def until(command, start, processes=1):
    """Run a command till it prints a line that begins with `start`, and kill it. Returns (the line,
    resident bytes of all of its processes then)."""
    import psutil

    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
    env = {**os.environ, **(threads if processes > 1 else {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parent, env=env) as child:  # fmt: skip
        found = next((line for line in child.stdout if line.startswith(start)), None)
        if not found:
            fail(f"bench: {' '.join(map(str, command))} ended: {child.stderr.read()[-500:]}")
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        memory = sum(process.memory_info().rss for process in family)
        for process in family:
            process.kill()
    return found, memory


def decoding(kind, batch_size=1, tokens=200):
    """Tokens decoded greedily by random GPT-2 124M weights after a prompt of 8."""
    torch.manual_seed(1)
    model = GPT(GPTConfig()).eval()
    prompt = torch.arange(8, device=device()).repeat(batch_size, 1)
    if kind.startswith("transformers"):
        hf = model.to_hf().to(device(), torch.bfloat16 if kind.endswith("bf16") else torch.float32)
        options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        options |= dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
        while True:
            hf.generate(prompt, **options)
            yield batch_size * tokens
    if kind.startswith("ctranslate2"):
        generator = to_ctranslate2(model, kind.partition("-")[2] or "float32")
        start = [[f"t{i}" for i in range(8)]] * batch_size
        options = dict(max_length=tokens, min_length=tokens, sampling_topk=1)
        while True:
            generator.generate_batch(start, include_prompt_in_result=False, **options)
            yield batch_size * tokens
    tune_allocator()
    model = model.to(device()) if kind == "fp32" else pack(model.to(device()), kind)
    while True:
        model.generate(prompt, tokens, temperature=0)
        yield batch_size * tokens


def to_ctranslate2(model, compute_type):
    """A ctranslate2.Generator with the weights of `model` and tokens called t0, t1, ..."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = {f"t{i}": i for i in range(model.config.vocab_size)}
    engine = Tokenizer(models.WordLevel(names, unk_token="t0"))
    last = f"t{model.config.vocab_size - 1}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token=last, eos_token=last,
                                        unk_token=last)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.to_hf(f"{folder}/hf")
        tokenizer.save_pretrained(f"{folder}/hf")
        ctranslate2.converters.TransformersConverter(f"{folder}/hf").convert(f"{folder}/ct2")
        threads = torch.get_num_threads()
        return ctranslate2.Generator(f"{folder}/ct2", compute_type=compute_type,
                                     intra_threads=threads)  # fmt: skip


def whole_text(path):
    """The text of a file, or of the standard library."""
    files = prepare.source_files(path or "stdlib", ".")
    return "".join(Path(file).read_text(encoding="utf-8") for file in files)


def tokenizing(ours, text):
    """Megabytes of text turned into GPT-2 tokens: prepare.py end to end, or tiktoken alone on
    pieces of 1 MB in memory, on all cores."""
    content = whole_text(text)
    content *= 1 + 10**8 // len(content)
    if not ours:
        encoding = prepare.open_tiktoken("gpt2").engine
        pieces = [content[i : i + 2**20] for i in range(0, len(content), 2**20)]
        size = len(content.encode()) / 1e6
        while True:
            for i in range(0, len(pieces), 64):  # all tokens of a gigabyte would fill the memory
                encoding.encode_ordinary_batch(pieces[i : i + 64], num_threads=os.cpu_count())
            yield size
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(content, encoding="utf-8", newline="")
        size, runs = (Path(folder) / "text.txt").stat().st_size / 1e6, 0
        while True:
            source, runs = f"{folder}/text.txt", runs + 1
            prepare.main(prepare.Config(f"run{runs}", source, "gpt2", data_dir=folder))
            yield size


def pretraining(ours, text):
    """Tokens, padding not counted, of one update of KantaiBERT (84M at 52,000 tokens of vocabulary)
    on 64 lines: train_roberta.py's parts, or what transformers' Trainer does by default: fp32,
    lines padded to the longest, the vocabulary head over every position."""
    import transformers

    import train_roberta

    cfg = train_roberta.Config()
    lines = list(train_roberta.read_lines(prepare.source_files(text or "stdlib", ".")))[:8192]
    with tempfile.TemporaryDirectory() as folder:
        train_roberta.train_tokenizer(lines, cfg.vocab_size, folder)
        tokenizer = train_roberta.open_tokenizer(folder, cfg)
    masked = train_roberta.Masked(
        train_roberta.encode(lines, tokenizer, cfg.block_size, cfg.packing), tokenizer, cfg
    )
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(cfg.seed)
    model = train_roberta.make_model(cfg, cfg.vocab_size, special)
    if ours:
        tune_allocator()
    else:
        model = transformers.RobertaForMaskedLM(model.config)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    bf16 = ours and pick_precision("auto", "cpu") == "bf16"

    def pad(pairs):  # [(ids, labels), ...] -> tensors (64, T)
        longest = max(len(ids) for ids, _ in pairs)
        fill = {"input_ids": special[1], "labels": -100, "attention_mask": 0}
        rows = [(ids, labels, np.ones_like(ids)) for ids, labels in pairs]
        return {
            name: torch.from_numpy(np.stack(
                [np.pad(r[i], (0, longest - len(r[i])), constant_values=fill[name]) for r in rows]
            )).long() for i, name in enumerate(("input_ids", "labels", "attention_mask"))
        }  # fmt: skip

    places = list(train_roberta.Order(len(masked), 64 * 200, cfg.seed))
    while True:
        for at in range(0, len(places), 64):
            pairs = [masked[place] for place in places[at : at + 64]]
            batch = train_roberta.collate(pairs, special[1]) if ours else pad(pairs)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield sum(len(ids) for ids, _ in pairs)


def finetuning(ours):
    """Pairs trained on in 20 updates of 8, with an encoder of 22M parameters (MiniLM's shape) and
    pairs as long as MRPC's: finetune_mrpc.py's parts, or the plain loop of a lesson: fp32, torch's
    AdamW, shuffled and padded a batch."""
    import transformers
    from tokenizers import Tokenizer, models

    import finetune_mrpc

    torch.manual_seed(42)
    lengths = torch.normal(53.0, 14.0, (640,)).clamp(20, 110).long().tolist()  # MSR's, measured
    pairs = [{"input_ids": torch.randint(1, 30522, (n,)).tolist(), "attention_mask": [1] * n,
              "labels": n % 2} for n in lengths]  # fmt: skip
    engine = Tokenizer(models.WordLevel({"[PAD]": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="[PAD]")
    collate = transformers.DataCollatorWithPadding(tokenizer)
    shape = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=2,
        attn_implementation=finetune_mrpc.attention("cpu") if ours else None)  # fmt: skip
    model = transformers.BertForSequenceClassification(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=ours or None)
    if ours:
        tune_allocator()
    bf16 = ours and pick_precision("auto", "cpu") == "bf16"
    window, epoch, updates = finetune_mrpc.Config.length_window if ours else 0, 0, 0
    while True:
        for rows in finetune_mrpc.epoch_batches(lengths, 8, window, 42, epoch):
            inputs = collate([pairs[row] for row in rows])
            labels = inputs.pop("labels")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            if ours:  # it skips updates that are not finite
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                torch.nn.utils.get_total_norm(grads).item()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            updates += 1
            if updates % 20 == 0:
                yield 160
        epoch += 1


def command(name, text):
    """3,600 for each time that a whole command has run from start to end: train.py with a recipe,
    or the plain script of the same work below, on a text prepared first."""
    recipe = name.removeprefix("plain_")
    with tempfile.TemporaryDirectory() as folder:
        if recipe == "char":
            content = whole_text(text)[:1_100_000]  # as long as nanoGPT's
            text = Path(folder, "text.txt")
            text.write_text(content, encoding="utf-8")
        elif not text:
            fail("bench.py verdict needs the story: --text=the-verdict.txt")
        tokenizer = "char" if recipe == "char" else "gpt2"
        prepare.main(prepare.Config(recipe, str(text), tokenizer, data_dir=folder))
        script = ["-c", f"import bench; bench.{name}({folder + '/' + recipe!r})"]
        if name == recipe:
            root = Path(__file__).parent
            script = [root / "train.py", root / f"config/{name}.py", f"--data_dir={folder}"]
        yield 0  # all of the work is in the turns
        while True:
            out = [f"--out_dir={tempfile.mkdtemp(dir=folder)}"] if name == recipe else []
            child = subprocess.Popen([sys.executable, *script, *out], stdout=subprocess.PIPE,
                                     text=True, cwd=Path(__file__).parent)  # fmt: skip
            said = child.stdout.read()
            peak = os.wait4(child.pid, 0)[2].ru_maxrss * 1024 / 1e9
            losses = re.findall(r"train loss ([\d.]+).*?val loss ([\d.]+)", said)
            yield 3600, "train {}, val {}, {:.2f} GB".format(*losses[-1], peak)


def plain_char(folder):
    """nanoGPT's loop on a CPU with transformers' GPT-2: 2,000 iterations of 12 x 64 at random
    places, AdamW, warm-up and cosine, fp32, 20 batches of each split every 250."""
    from transformers import GPT2Config, GPT2LMHeadModel

    data = {s: np.load(f"{folder}/{s}.npy").astype(np.int64) for s in ("train", "val")}
    torch.manual_seed(1337)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=int(data["train"].max()) + 1, n_positions=64, n_embd=128, n_layer=4, n_head=4,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)

    def loss_of(split, places):
        rows = np.stack([data[split][i : i + 65] for i in places])
        idx, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        logits = model(idx).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def at_random(split):
        return loss_of(split, np.random.randint(0, len(data[split]) - 65, 12))

    for it in range(2000):
        if it % 250 == 0:
            with torch.no_grad():
                _ = [at_random(split).item() for split in data for _ in range(20)]
        lr = 1e-3 * it / 100 if it < 100 else 1e-4 + 9e-4 / 2 * (
            1 + math.cos(math.pi * (it - 100) / 1900))  # fmt: skip
        optimizer.param_groups[0]["lr"] = lr
        loss = at_random("train")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print_losses(loss_of, data, 64)


def plain_verdict(folder):
    """The book's script (chapter 5) in plain PyTorch, fp32: 10 epochs of 9 batches of 2 x 256, five
    batches of each split every 5 updates, 50 tokens without a cache after each epoch."""
    data = {s: np.load(f"{folder}/{s}.npy").astype(np.int64) for s in ("train", "val")}
    torch.manual_seed(123)
    model = Plain(50257, 256, 768, 12, 12, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)

    def loss_of(split, places):
        rows = np.stack([data[split][i : i + 257] for i in places])
        idx, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
        return torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    for it in range(90):
        if it % 9 == 0:
            order = torch.randperm(18).view(9, 2)
        optimizer.zero_grad()
        loss_of("train", (order[it % 9] * 256).tolist()).backward()
        optimizer.step()
        if it % 5 == 0:
            model.eval()
            with torch.no_grad():
                _ = [loss_of(s, [512 * i, 512 * i + 256]).item() for s, n in
                     (("train", 5), ("val", 1)) for i in range(n)]  # fmt: skip
            model.train()
        if it % 9 == 8:
            model.eval()
            idx = torch.tensor([[6109, 3626, 6100, 345]])  # Every effort moves you
            with torch.no_grad():
                for _ in range(50):
                    idx = torch.cat([idx, model(idx[:, -256:])[:, -1].argmax(-1, True)], dim=1)
            model.train()
    model.eval()
    print_losses(loss_of, data, 256)


@torch.no_grad()
def print_losses(loss_of, data, T):
    """The losses over all windows of the validation split and as many of the training split."""
    n = (len(data["val"]) - 1) // T
    losses = []
    for split in ("train", "val"):
        windows = [i * T for i in range(n)]
        parts = [windows[i : i + 12] for i in range(0, n, 12)]
        losses.append(sum(loss_of(split, part).item() * len(part) for part in parts) / n)
    print("train loss {:.3f} | val loss {:.3f}".format(*losses))


class Plain(torch.nn.Module):
    """The book's GPT (chapter 4) in the plainest PyTorch: three projections, own LayerNorm and
    GELU, a mask that is filled in, an untied head."""

    def __init__(self, V, T, C, layers, heads, p):
        super().__init__()
        self.T, self.C, self.heads, self.p = T, C, heads, p
        nn = torch.nn
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.head = nn.Linear(C, V, False)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "q": nn.Linear(C, C, False), "k": nn.Linear(C, C, False), "v": nn.Linear(C, C, False),
            "out": nn.Linear(C, C), "up": nn.Linear(C, 4 * C), "down": nn.Linear(4 * C, C),
        }) for _ in range(layers))  # fmt: skip
        self.scale = nn.Parameter(torch.ones(2 * layers + 1, C))
        self.shift = nn.Parameter(torch.zeros(2 * layers + 1, C))
        self.register_buffer("future", torch.triu(torch.ones(T, T), 1).bool())

    def norm(self, x, i):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale[i] * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift[i]

    def drop(self, x):
        return torch.nn.functional.dropout(x, self.p, self.training)

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V)"""
        (B, T), heads = idx.shape, self.heads
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T)))
        for i, block in enumerate(self.blocks):
            y = self.norm(x, 2 * i)
            q, k, v = (block[n](y).view(B, T, heads, -1).transpose(1, 2) for n in "qkv")
            scores = (q @ k.mT).masked_fill(self.future[:T, :T], -torch.inf)
            weights = self.drop(torch.softmax(scores / k.size(-1) ** 0.5, -1))
            x = x + self.drop(block["out"]((weights @ v).transpose(1, 2).reshape(B, T, self.C)))
            y = block["up"](self.norm(x, 2 * i + 1))
            y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))  # GELU
            x = x + self.drop(block["down"](y))
        return self.head(self.norm(x, -1))


def sides(what, cfg):
    """{row: [(name, generator, its arguments), ...]}, ours first, the peer second; perhaps then
    (a limit of the machine, how much of it one unit of the row costs at least)."""
    update = {T: 6 * 124e6 + 12 * 12 * 768 * T for T in (256, 1024)}  # FLOPs a token
    table = {
        "train": {
            "train 124M, 2 x 256, dropout 0.1 (tokens/s)": [
                ("ours", training, True), ("transformers, plain fp32 loop", training, False),
                ("bf16 matrix product, GFLOP/s", update[256])],
            "first update of 86M (starts/min)": [
                ("ours", starting, True, cfg.text), ("the plain loop", starting, False, cfg.text)],
            "reading data against training (tokens/s)": [
                ("reading", loading), ("training", training, True)],
        },
        "sample": {
            "decode 124M, batch 1, fp32 (tokens/s)": [
                ("ours", decoding, "fp32"), ("ctranslate2", decoding, "ctranslate2"),
                ("copy, GB/s read and written", 4 * 124e6)],
            "the same against transformers": [
                ("ours", decoding, "fp32"), ("transformers", decoding, "transformers")],
            "decode 124M, batch 1, int8 (tokens/s)": [
                ("ours", decoding, "int8"), ("ctranslate2 int8", decoding, "ctranslate2-int8"),
                ("copy, GB/s read and written", 124e6)],
            "decode 124M, bf16, 16 samples (tokens/s)": [
                ("16 at once", decoding, "bf16", 16), ("one after another", decoding, "bf16")],
        },
        "prepare": {
            "prepare --text, 100 MB at least, gpt2 (MB/s)": [
                ("ours, end to end", tokenizing, True, cfg.text),
                ("tiktoken alone", tokenizing, False, cfg.text)],
        },
        "roberta": {
            "KantaiBERT 84M, 64 lines an update (tokens/s)": [
                ("ours", pretraining, True, cfg.text),
                ("the Trainer's default, fp32", pretraining, False, cfg.text)],
        },
        "mrpc": {
            "fine-tune 22M, 8 pairs an update (pairs/s)": [
                ("ours", finetuning, True), ("plain fp32 loop", finetuning, False)],
        },
        "char": {
            "character GPT 0.8M, whole command (runs/h)": [
                ("train.py config/char.py", command, "char", cfg.text),
                ("nanoGPT's loop with transformers", command, "plain_char", cfg.text)],
        },
        "verdict": {
            "The Verdict, whole command (runs/h)": [
                ("train.py config/verdict.py", command, "verdict", cfg.text),
                ("the book's script", command, "plain_verdict", cfg.text)],
        },
    }  # fmt: skip
    if device().type == "cuda":
        limit = ("bf16 matrix product, GFLOP/s", update[1024])
        peer = "nanoGPT's loop, transformers"
        at_once = {rows: (50257, rows, 480 // rows, 1024, 0.0) for rows in (12, 32)}
        table["train"] = {
            "train 124M, 480 x 1,024, compiled (tokens/s)": [
                ("ours, 32 at once", training, True, *at_once[32]),
                (f"{peer}, 12 at once", training, False, *at_once[12]), limit],
            "the same, 32 at once (tokens/s)": [
                ("ours", training, True, *at_once[32]),
                (peer, training, False, *at_once[32]), limit],
        }  # fmt: skip
        table["sample"] = {
            f"decode 124M, batch {rows}, {kind} (tokens/s)": [
                ("ours", decoding, kind, rows),
                ("transformers", decoding, f"transformers-{kind}", rows),
                ("copy, GB/s read and written", width * 124e6 / rows),
            ]
            for rows in (1, 16)
            for kind, width in (("fp32", 4), ("bf16", 2))
        }
    long = ("char", "verdict")
    wanted = [k for k in table if k == what or (what == "all" and k not in long)]
    return {row: pair for k in wanted for row, pair in table[k].items()}


# ---------------------------------------------------------------------------------------------
# taking turns


def serve(side):
    """Child: set a side up, then do a turn for each line on stdin and answer (rate, note)."""
    name, *arguments = json.loads(side)
    turns = globals()[name](*arguments)
    with open(1, "w", closefd=False) as answers, open(os.devnull, "w") as quiet:
        sys.stdout = quiet  # what the peers print is not an answer
        next(turns)
        print("ready", file=answers, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            done = next(turns)
            finish()
            amount, note = done if isinstance(done, tuple) else (done, "")
            answer = amount / (time.perf_counter() - began), note
            print(json.dumps(answer), file=answers, flush=True)


def finish():
    """Wait until the GPU has done what it was told."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def take_turns(pair, rounds):
    """[(name, generator, arguments), ...] -> for each the list of its rates and its last note."""
    children = []
    for _, function, *arguments in pair:
        side = json.dumps([function.__name__, *arguments])
        command = [sys.executable, __file__, f"--side={side}"]
        children.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for child in children:  # nobody's setting up disturbs another's turn
        if not child.stdout.readline():
            fail(f"bench: {child.args[-1]} could not be set up; run it alone to see why")
    rates, notes = [[] for _ in children], [""] * len(children)
    for _ in range(rounds):
        for i, child in enumerate(children):
            child.stdin.write("go\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                fail(f"bench: {child.args[-1]} ended; run it alone to see why")
            rate, notes[i] = json.loads(answer)
            rates[i].append(rate)
    for child in children:
        child.stdin.close()
        child.wait()
    return rates, notes


def limits(rounds):
    """The machine's own speed: {name: median rate}."""
    measured = {}
    for name, turns in {
        "fp32 matrix product, GFLOP/s": gemm(torch.float32),
        "bf16 matrix product, GFLOP/s": gemm(torch.bfloat16),
        "copy, GB/s read and written": copy(),
    }.items():
        next(turns)
        rates = []
        for _ in range(rounds):
            finish()
            began = time.perf_counter()
            done = next(turns)
            finish()
            rates.append(done / (time.perf_counter() - began) / 1e9)
        measured[name] = statistics.median(rates)
    return measured


def scale(cfg):
    """Speed and memory of train.py against the size of its work: a table, and bench.png."""
    from matplotlib.figure import Figure

    base = {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 8, "block_size": 256}
    shapes = [(4, 4, 128), (6, 6, 384), (8, 8, 512), (12, 12, 768), (24, 16, 1024)]
    sweeps = {
        "parameters": [dict(zip(("n_layer", "n_head", "n_embd"), s, strict=True)) for s in shapes],
        "block_size": [{"block_size": 2048 // b, "batch_size": b} for b in (16, 8, 4, 2, 1)],
        "batch_size": [{"batch_size": b} for b in (1, 2, 4, 8, 16, 32)],
        "processes": [{}, {"processes": 2, "batch_size": 4}],
    }  # fmt: skip
    figure = Figure(figsize=(11, 6), layout="constrained")
    result, axes = [], figure.subplots(2, len(sweeps), sharex="col", sharey="row")
    print("| against | parameters | batch x block x processes | tokens/s | GB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        text = cfg.text or "stdlib"
        prepare.main(prepare.Config("scale", text, vocab_size=4096, data_dir=folder))
        for column, (name, changes) in zip(axes.T, sweeps.items(), strict=True):
            points = []
            for change in changes:
                work = base | change
                processes = work.pop("processes", 1)
                several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
                options = [f"--{k}={v}" for k, v in work.items()]
                options += [f"--data_dir={folder}", f"--out_dir={tempfile.mkdtemp(dir=folder)}"]
                line, memory = until(
                    [sys.executable, *several * (processes > 1), "train.py", "--dataset=scale",
                     "--eval_interval=0", "--log_interval=3", "--optimizer=adamw", *options],
                    "iteration 6:", processes)  # fmt: skip
                speed = float(line.split()[-2].replace(",", ""))
                model = GPT(GPTConfig(work["block_size"], 4096, *[work[k] for k in (
                    "n_layer", "n_head", "n_embd")]))  # fmt: skip
                N = model.count_parameters()
                x = {"parameters": N, "processes": processes}.get(name) or work[name]
                points.append((x, speed, memory / 1e9))
                print(f"| {name} | {N / 1e6:.0f}M | {work['batch_size']} x {work['block_size']} x "
                      f"{processes} | {speed:,.0f} | {memory / 1e9:.2f} |", flush=True)  # fmt: skip
            xs, *ys = zip(*points, strict=True)
            for cell, y in zip(column, ys, strict=True):
                cell.plot(xs, y, marker="o")
                cell.set(xscale="log", yscale="log")
                cell.set_xticks(xs, [f"{x / 1e6:.0f}M" if x > 1e6 else str(x) for x in xs])
                cell.minorticks_off()
                cell.grid(alpha=0.3)
            column[1].set_xlabel(name)
            result.append({"against": name, "points": points})
    axes[0][0].set_ylabel("tokens per second")
    axes[0][0].set_yticks(ticks := (300, 1000, 3000, 10000, 30000), map("{:,}".format, ticks))
    axes[1][0].set_ylabel("memory (GB)")
    axes[1][0].set_yticks(ticks := (0.5, 1, 2, 4, 8), map(str, ticks))
    figure.suptitle(
        "train.py, 2,048 tokens an update but for batch_size; 12M parameters but for the first"
    )
    figure.savefig("bench.png", dpi=110)
    print("wrote bench.png")
    return result


@torch.no_grad()
def quantize(cfg):
    """Perplexity on the run's own validation split, and how often the likeliest next token is that
    of the fp32 weights: given the text, and in 8 greedy continuations of 100 tokens."""
    import train
    from runtime import checkpoints

    found = checkpoints(cfg.run)
    if not found:
        fail(f"{cfg.run} holds no checkpoint; train it first: python train.py")
    trained = json.loads((found[0] / "config.json").read_text(encoding="utf-8"))["train"]
    tokens = prepare.open_split(Path(trained["data_dir"], trained["dataset"]), "val")
    result = []
    print("| weights | val perplexity | same likeliest token | same greedy text |")
    print("|---|---|---|---|")
    for kind in ("fp32", "bf16", "int8"):
        model = GPT.from_checkpoint(found[0]).eval()
        T, V = model.config.block_size, model.config.vocab_size
        model = model if kind == "fp32" else pack(model, kind)
        n = train.n_windows(tokens, T)
        windows = np.arange(min(n, 100)) * n // min(n, 100)  # spread over the split
        loss, likeliest = 0.0, []
        for window in windows:
            idx, targets = train.read_windows(tokens, np.array([window]), T, V, torch.device("cpu"))
            logits = model(idx)[0][0].float()  # (T, V)
            loss += torch.nn.functional.cross_entropy(logits, targets[0]).item() / len(windows)
            likeliest.append(logits.argmax(-1))
        prompts = [torch.from_numpy(tokens[i : i + 8].astype(np.int64))[None]
                   for i in range(0, len(tokens) - 8, len(tokens) // 8)][:8]  # fmt: skip
        texts = [model.generate(prompt, 100, temperature=0)[0, 8:] for prompt in prompts]
        both = torch.cat(likeliest), torch.cat(texts)
        if kind == "fp32":
            first = both
        same = [(a == b).float().mean().item() for a, b in zip(both, first, strict=True)]
        print(f"| {kind} | {math.exp(loss):.3f} | {same[0]:.2%} | {same[1]:.2%} |", flush=True)
        result.append({"weights": kind, "perplexity": math.exp(loss), "same": same})
    return result


def compare(cfg, what):
    """Print the machine's limits and a table: medians of both sides, their ratio, the share of the
    limit that binds ours, the spread of the ratio over the rounds."""
    result = {"limits": limits(cfg.rounds), "rows": []}
    for name, rate in result["limits"].items():
        print(f"{name}: {rate:,.0f}")
    print(f"{'work':46}{'ours':>13}{'peer':>11}{'ratio':>10}{'limit':>7}  spread; peer")
    for row, (us, them, *bound) in sides(what, cfg).items():
        (ours, peer), notes = take_turns([us, them], cfg.rounds)
        medians = [statistics.median(rates) for rates in (ours, peer)]
        ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
        ratio, share = medians[0] / medians[1], ""
        for limit, cost in bound:
            share = f"{medians[0] * cost / 1e9 / result['limits'][limit]:.0%}"
        said = f"; ours: {notes[0]}; peer: {notes[1]}" if any(notes) else ""
        print(f"{row:46}{medians[0]:13,.1f}{medians[1]:11,.1f}{ratio:10,.2f}{share:>7}  "
              f"{ratios[0]:.2f}-{ratios[-1]:.2f}; {them[0]}{said}", flush=True)  # fmt: skip
        result["rows"].append(dict(work=row, ours=ours, peer=peer, ratio=ratio, name=them[0],
                                   share_of_limit=share, notes=notes))  # fmt: skip
    return result


def main(cfg, what="all"):
    """Measure `what`; write the result as JSON where asked."""
    if cfg.side:
        return serve(cfg.side)
    if what in ("scale", "quantize"):
        result = {"scale": scale, "quantize": quantize}[what](cfg)
    else:
        result = compare(cfg, what)
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(CFG, WHAT)
