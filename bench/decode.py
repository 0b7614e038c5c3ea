"""decoding by GPT-2 124M in fp32, bf16, int8, int4 and 16 at once, tokens/s; 8 minutes"""

import ctypes

import torch

import convert
import fast
import prepare
import sample
from bench.plain import DEVICE
from bench.scripts import prepare_data
from bench.turns import COPY, SHAPE, Side, compare
from model import GPT, GPTConfig
from runtime import tune_allocator

TOKENS = 200  # a turn, greedily, after a prompt of 8
BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5625}  # of a weight; Q4_0 has its scales
GGUF = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}


def random_model():
    """GPT-2 with the same random weights for every side."""
    torch.manual_seed(1)
    return GPT(GPTConfig(**SHAPE)).eval()


def ours(kind, batch_size=1):
    """Tokens decoded by sample.generate."""
    tune_allocator()
    model = random_model().to(DEVICE)
    if kind != "fp32":
        model = fast.quantize(model, kind)
    prompt = torch.arange(8, device=DEVICE).repeat(batch_size, 1)
    while True:
        sample.generate(model, prompt, TOKENS, temperature=0)
        yield batch_size * TOKENS


def by_transformers(kind, batch_size=1):
    """The same by transformers' generate."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    model = convert.to_transformers(random_model()).to(DEVICE, dtype)
    prompt = torch.arange(8, device=DEVICE).repeat(batch_size, 1)
    while True:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0,
                       max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        yield batch_size * TOKENS


def by_ctranslate2(kind, folder):
    """The same by CTranslate2, for which tokens are called t0, t1, ..."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    hf = f"{folder}/hf-{kind}"
    convert.to_transformers(random_model(), hf)
    words = models.WordLevel({f"t{i}": i for i in range(SHAPE["vocab_size"])}, "t0")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t511")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(hf)
    model = ctranslate2.Generator(
        ctranslate2.converters.TransformersConverter(hf).convert(f"{folder}/{kind}"),
        compute_type=kind.replace("fp32", "float32"), intra_threads=torch.get_num_threads())
    while True:
        model.generate_batch([[f"t{i}" for i in range(8)]], max_length=TOKENS, min_length=TOKENS,
                             sampling_topk=1, include_prompt_in_result=False)
        yield TOKENS


def by_llama_cpp(kind, folder):
    """The same by llama.cpp, which itself quantizes our GGUF."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)  # named, else ctypes frees it
    llama_cpp.llama_log_set(quiet, None)
    file = f"{folder}/{kind}.gguf"
    tokenizer = prepare.load_tokenizer(folder / "text")
    convert.write_gguf(folder, random_model(), tokenizer, "random", "f32")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{GGUF[kind]}")
    if llama_cpp.llama_model_quantize(f"{folder}/model.gguf".encode(), file.encode(),
                                      ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp cannot make {file}")
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(file, n_ctx=8 + TOKENS, n_threads=threads, n_threads_batch=threads,
                            verbose=False)
    while True:
        made = model.generate(list(range(8)), temp=0.0)
        for _ in range(TOKENS):
            next(made)
        made.close()
        yield TOKENS


def run(cfg, folder):
    """Each kind of weights beside the peers that have it; the limit is reading all weights."""
    def side(kind, rows=1):
        return Side(f"sample.py, {kind}, batch {rows}", ours, (kind, rows), COPY,
                    BYTES[kind] * 124e6 / rows, ours=True)

    def transformers(kind, rows=1):
        return Side(f"transformers, {kind}, batch {rows}", by_transformers, (kind, rows))

    def ctranslate2(kind):
        return Side(f"CTranslate2, {kind}", by_ctranslate2, (kind, folder), needs="ctranslate2")

    def llama_cpp(kind):
        return Side(f"llama.cpp, {GGUF[kind]}", by_llama_cpp, (kind, folder), needs="llama_cpp")

    if DEVICE == "cuda":
        return compare(cfg, {f"decode 124M, {kind}, batch {rows} (tokens/s)":
                             [side(kind, rows), transformers(kind, rows)]
                             for rows in (1, 16) for kind in ("fp32", "bf16")}, rounds=3)
    prepare_data("text", prepare.__file__, "bpe", folder, 300)  # a GGUF needs some tokenizer
    return compare(cfg, {
        "decode 124M, fp32 (tokens/s)":
            [side("fp32"), transformers("fp32"), ctranslate2("fp32"), llama_cpp("fp32")],
        "the same, bf16": [side("bf16"), side("fp32"), transformers("bf16"), llama_cpp("bf16")],
        "the same, int8": [side("int8"), ctranslate2("int8"), llama_cpp("int8")],
        "the same, int4": [side("int4"), llama_cpp("int4")],
        "decode 124M, 16 at once (tokens/s)":
            [side("bf16", 16), side("bf16"), transformers("bf16", 16)]})
