"""decoding by GPT-2 124M in fp32, bf16, int8, int4 and 16 at once, tokens/s; 8 minutes"""

import os
import sys

import torch

import convert
import fast
import prepare
import sample
from bench import llama
from bench.turns import COPY, Side, compare, device_type, is_missing, prepare_data, shape
from model import GPT, GPTConfig
from runtime import tune_allocator

BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5625}  # of a weight; Q4_0 has its scales


def random_model(shape):
    """GPT-2 with the same random weights for every side."""
    torch.manual_seed(1)
    return GPT(GPTConfig(**shape)).eval()


def ours(shape, tokens, kind, batch_size=1):
    """Tokens decoded greedily by sample.generate after a prompt of 8."""
    tune_allocator()
    model = random_model(shape).to(device_type())
    if kind != "fp32":
        model = fast.quantize(model, kind)
    prompt = torch.arange(8, device=device_type()).repeat(batch_size, 1)
    while True:
        sample.generate(model, prompt, tokens, temperature=0)
        yield batch_size * tokens


def by_transformers(shape, tokens, kind, batch_size=1):
    """The same by transformers' generate."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    model = convert.to_transformers(random_model(shape)).to(device_type(), dtype)
    prompt = torch.arange(8, device=device_type()).repeat(batch_size, 1)
    while True:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0,
                       max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        yield batch_size * tokens


def by_ctranslate2(shape, tokens, kind, folder):
    """The same by CTranslate2, for which tokens are called t0, t1, ..."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    engine = Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape["vocab_size"])}, "t0"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t511")
    convert.to_transformers(random_model(shape), f"{folder}/hf-{kind}")
    PreTrainedTokenizerFast(tokenizer_object=engine, **special).save_pretrained(
        f"{folder}/hf-{kind}")
    converter = ctranslate2.converters.TransformersConverter(f"{folder}/hf-{kind}")
    model = ctranslate2.Generator(converter.convert(f"{folder}/{kind}"), compute_type=kind,
                                  intra_threads=torch.get_num_threads())
    while True:
        model.generate_batch([[f"t{i}" for i in range(8)]], max_length=tokens, min_length=tokens,
                             sampling_topk=1, include_prompt_in_result=False)
        yield tokens


def write_gguf(shape, folder):
    """The random model as folder/model.gguf, in fp32, with a small tokenizer."""
    prepare_data("text", prepare.__file__, "bpe", folder, 300)
    tokenizer = prepare.load_tokenizer(folder / "text")
    convert.write_gguf(folder, random_model(shape), tokenizer, "random", "f32")


def run(cfg, folder):
    """Each kind of weights beside the peers that have it; the limit is reading all weights."""
    work = (shape(cfg), 20 if cfg.tiny else 200)

    def side(kind, rows=1):
        limit = (COPY, BYTES[kind] * 124e6 / rows)
        return Side(f"sample.py, {kind}, batch {rows}", ours, (*work, kind, rows), limit)

    def transformers(kind, rows=1):
        return Side(f"transformers, {kind}", by_transformers, (*work, kind, rows))

    if device_type() == "cuda":
        return compare(cfg, {f"decode 124M, {kind}, batch {rows} (tokens/s)":
                             [side(kind, rows), transformers(kind, rows)]
                             for rows in (1, 16) for kind in ("fp32", "bf16")}, rounds=3)

    def ctranslate2(kind):
        args = (*work, kind, str(folder))
        return Side(f"CTranslate2, {kind}", by_ctranslate2, args, needs="ctranslate2")

    def llama_cpp(kind):
        args = (str(folder / "model.gguf"), kind, work[1], torch.get_num_threads())
        return Side(f"llama.cpp, {kind or 'F32'}", llama.decoding, args, needs="llama_cpp",
                    python=os.environ.get("LLAMA_CPP_PYTHON", sys.executable))

    if not is_missing(llama_cpp("")):
        write_gguf(work[0], folder)
    return compare(cfg, {
        "decode 124M, fp32 (tokens/s)":
            [side("fp32"), transformers("fp32"), ctranslate2("float32"), llama_cpp("")],
        "the same, bf16":
            [side("bf16"), side("fp32"), transformers("bf16"), llama_cpp("MOSTLY_BF16")],
        "the same, int8": [side("int8"), ctranslate2("int8"), llama_cpp("MOSTLY_Q8_0")],
        "the same, int4": [side("int4"), llama_cpp("MOSTLY_Q4_0")],
        "decode 124M, 16 at once (tokens/s)":
            [side("bf16", 16), side("bf16"), transformers("bf16", 16)]})
