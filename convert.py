"""Weights and tokenizers in and out: GPT-2, Llama and Qwen3 of transformers, and GGUF.

    python convert.py out/verdict FOLDER                             # for transformers, vLLM, ...
    python convert.py out/verdict FOLDER --format=gguf --dtype=q8_0  # for llama.cpp, Ollama

In a notebook: model = from_pretrained("HuggingFaceTB/SmolLM2-135M"), and to_transformers(model).
The family follows from GPTConfig: learned positions are GPT-2, qk_norm is Qwen3, else Llama.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from configurator import load, usage_error


@dataclass
class Config:
    """Write a trained model for other programs: python convert.py RUN FOLDER."""

    run: Positional[str] = ""  # a run of train.py, or one of its checkpoints
    folder: Positional[str] = ""  # where to write, a new or empty folder
    format: Literal["hf", "gguf"] = "hf"  # a transformers folder, or GGUF for llama.cpp and Ollama
    dtype: Literal["f32", "f16", "q8_0"] = "f16"  # of a GGUF's matrices; transformers gets f32


if __name__ == "__main__":
    CFG = load(Config, files=False)  # parse before the slow imports: --help answers at once
    if not CFG.run or not CFG.folder:
        usage_error("usage: python convert.py RUN FOLDER [--format=hf|gguf] [--dtype=q8_0]")

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F

import prepare
import sample
from model import GPT, GPTConfig
from runtime import UserError, check_range, commit_folder, disk_errors, one_line, print0, run_script

HUB_FILES = ["*.json", "model*.safetensors"]
FAMILIES = {  # model_type: {GPTConfig's name: transformers' name}
    "gpt2": dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer",
                 n_head="n_head", n_embd="n_embd", n_inner="n_inner",
                 norm_eps="layer_norm_epsilon", tie_weights="tie_word_embeddings"),
    "llama": dict(block_size="max_position_embeddings", vocab_size="vocab_size",
                  n_layer="num_hidden_layers", n_head="num_attention_heads",
                  n_kv_head="num_key_value_heads", head_dim="head_dim", n_embd="hidden_size",
                  n_inner="intermediate_size", norm_eps="rms_norm_eps",
                  tie_weights="tie_word_embeddings"),
}
FAMILIES["qwen3"] = FAMILIES["llama"]
# What a config.json can say and this model cannot: the field, and the values that it may have.
LIMITS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "hidden_act": ("silu", "swish"),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,), "attention_bias": (False,), "mlp_bias": (False,),
    "use_sliding_window": (False,), "sliding_window": (None,), "layer_types": (None,),
    "rope_type": ("default",), "partial_rotary_factor": (None, 1.0), "quantization_config": (None,),
}
# (ours, transformers' Llama): replaced in this order on the way out, backwards on the way in.
LLAMA_NAMES = (
    ("transformer.wte.", "model.embed_tokens."), ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."), ("ln_1.", "input_layernorm."),
    ("ln_2.", "post_attention_layernorm."), ("attn.c_proj.", "attn.o_proj."),
    (".attn.", ".self_attn."), ("mlp.c_fc.", "mlp.up_proj."), ("mlp.c_gate.", "mlp.gate_proj."),
    ("mlp.c_proj.", "mlp.down_proj."),
)
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# --- names and layouts of the weights --------------------------------------------------------


def to_hf_names(state, config):
    """Our state dict -> transformers'. GPT-2's names are ours, but its Conv1D keeps (in, out)."""
    renamed = {}
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    for key, weight in state.items():
        if config.rope_theta is None:
            renamed[key] = weight.t().contiguous() if key.endswith(GPT2_TRANSPOSED) else weight
            continue
        for ours, theirs in LLAMA_NAMES:
            key = key.replace(ours, theirs)
        if "c_attn" not in key:
            renamed[key] = weight
            continue
        parts = weight.split([n * config.head_dim for n in heads])  # ((nh + 2 nkv) hs, C)
        for name, part in zip("qkv", parts, strict=True):
            renamed[key.replace("c_attn", f"{name}_proj")] = part.contiguous()
    return renamed


def from_hf_names(state, config):
    """The inverse of to_hf_names."""
    if config.rope_theta is None:
        return to_hf_names(state, config)  # transposing twice is a no-op
    renamed = {}
    for key, weight in state.items():
        for ours, theirs in reversed(LLAMA_NAMES):
            key = key.replace(theirs, ours)
        renamed[key] = weight
    for i in range(config.n_layer):
        name = f"transformer.h.{i}.attn.{{}}.weight"
        qkv = [renamed.pop(name.format(f"{part}_proj")) for part in "qkv"]
        renamed[name.format("c_attn")] = torch.cat(qkv)
    return renamed


def fold_embd_norm(model):
    """A copy of a model without embd_norm but equal logits: the norm depends on a row of wte alone,
    so the rows are normalised once. A head that shared them keeps them as they were."""
    if not model.config.embd_norm:
        return model
    folded = copy.deepcopy(model)
    folded.config.embd_norm = folded.config.tie_weights = False
    folded.lm_head.weight = torch.nn.Parameter(folded.lm_head.weight.clone())
    weight = folded.transformer.wte.weight.data
    weight.copy_(F.rms_norm(weight, weight.shape[1:], eps=model.config.norm_eps))
    return folded


# --- in --------------------------------------------------------------------------------------


def local_folder(name):
    """The folder `name`, or that of the hub's model `name`: downloaded or, without a network, from
    the cache. Only JSON and safetensors are fetched. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    remedy = f"{name} is no folder here; one with config.json and model.safetensors is enough"
    with one_line(f"cannot download {name}", remedy, (OSError, ValueError)):  # no such name ...
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))


def load_tokenizer(name):
    """The prepare.Tokenizer that belongs to the weights `name`, a folder or a name on the hub."""
    return prepare.open_tokenizer_file(local_folder(name) / "tokenizer.json")


def gpt_config(c, dropout=0.0):
    """A configuration of transformers as GPTConfig. Raises UserError where it asks for what this
    model does not compute, ValueError where it is impossible."""
    if c.model_type not in FAMILIES:
        raise UserError(f"a {c.model_type} is none of {', '.join(FAMILIES)}")
    asked = vars(c) | (getattr(c, "rope_parameters", None) or {})
    layers = asked.get("layer_types") or []
    asked["layer_types"] = next((kind for kind in layers if kind != "full_attention"), None)
    for field, values in LIMITS.items():
        if asked.get(field, values[0]) not in values:
            raise UserError(f"this model cannot compute a {c.model_type} with {field} "
                            f"{asked[field]}, only {values[0]}")
    fields = {ours: getattr(c, theirs) for ours, theirs in FAMILIES[c.model_type].items()}
    if c.model_type != "gpt2":
        fields |= dict(rope_theta=asked["rope_theta"], rms_norm=True, swiglu=True, bias=False,
                       qkv_bias=False, qk_norm=c.model_type == "qwen3")
    return GPTConfig(**fields, dropout=dropout)


def check_same_tokenizer(name, tokenizer):
    """Raise UserError unless `tokenizer`, that of the data, is that of the weights `name`."""
    folder = local_folder(name)
    if not (folder / "tokenizer.json").exists():
        print0(f"warning: {name} has no tokenizer.json: its tokens may not be those of the data")
        return
    probe = "It's a test: 3.14, x**2  (ə ğ ş İ, 日本語, Привет 🙂)\r\n\tdef f(x): return 1000\n\n"
    if load_tokenizer(folder).encode(probe) != tokenizer.encode(probe):
        raise UserError(f"{name} has another tokenizer than the data: prepare the data again with "
                        f"--tokenizer={folder}", 2)


def from_pretrained(name, dropout=0.0):
    """The GPT in a transformers folder, or of that name on the hub: GPT2LMHeadModel,
    LlamaForCausalLM or Qwen3ForCausalLM; fp32, on the CPU, in eval mode. Raises UserError."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what it warns of is an error here
    folder = local_folder(name)
    # a stranger's file: there are checks of every kind
    with one_line(f"cannot load {name}", "a run of train.py must go through convert.py first"):
        hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with one_line(f"cannot load {name}", kinds=(KeyError, ValueError)):
        config = gpt_config(hf_config, dropout)
    with one_line(f"cannot load {name}"):
        hf, differs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=hf_config, dtype=torch.float32, attn_implementation="eager",
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    for kind, keys in differs.items():  # weights that `hf` drew at random, or left out
        keys = [key for key in keys if not str(key).endswith(".attn.masked_bias")]  # in old files
        if keys:
            raise UserError(f"{name} is another model or a part of one: {kind} {sorted(keys)[:3]}")
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(from_hf_names(hf.state_dict(), config), assign=True)
    # what the files hold counts: transformers does not tie a head that differs
    config.tie_weights = hf.lm_head.weight is hf.get_input_embeddings().weight
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


# --- out: transformers -----------------------------------------------------------------------


def transformers_config(c):
    """The inverse of gpt_config. Raises UserError for a mix of fields that no family has."""
    free = {"init", "dropout"}  # what plays no part in the logits
    if c.rope_theta is None:
        kind = "gpt2"
        free |= {"bias", "qkv_bias"}  # a GPT-2 has all of them: zeros
        more = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    else:
        kind = "qwen3" if c.qk_norm else "llama"
        more = dict(rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
    more |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields = {theirs: getattr(c, ours) for ours, theirs in FAMILIES[kind].items()}
    try:
        config = transformers.AutoConfig.for_model(kind, **fields, **more)
        back = vars(gpt_config(config))
    except (ValueError, StrictDataclassError) as error:  # all of it: its first line says little
        raise UserError(f"transformers has no such {kind}: {error}") from error
    wrong = [f"{name} {value}, not {back[name]}" for name, value in vars(c).items()
             if name not in free and value != back[name]]
    if wrong:
        raise UserError(f"transformers has no such model; its {kind} differs by {'; '.join(wrong)}")
    if c.rope_theta is not None:
        config.rope_theta = c.rope_theta  # readers that know no rope_parameters take 1e4 or 1e6
    return config


@torch.no_grad()
def to_transformers(model, folder=None):
    """A GPT as transformers' GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM with equal
    logits, saved to `folder` where one is given. Raises UserError for a changed model: one with
    other parameters, or with other logits, than its family."""
    model = fold_embd_norm(model)
    config = transformers_config(model.config)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    wanted = hf.state_dict()
    state = {name: torch.zeros_like(v) for name, v in wanted.items() if name.endswith("bias")}
    state |= to_hf_names(model.state_dict(), model.config)
    try:
        hf.load_state_dict(state)
    except RuntimeError as error:  # other names or shapes
        raise UserError(f"this model is no {type(hf).__name__}: {error}") from error
    training = model.training
    idx = torch.arange(min(7, model.config.block_size))[None] % model.config.vocab_size
    ours = model.eval()(idx.to(model.lm_head.weight.device))[0].float().cpu()
    model.train(training)
    difference = (hf(idx).logits - ours).abs().max() / ours.abs().max()
    if not difference < 0.01:
        raise UserError(f"this model is no {type(hf).__name__}: logits {difference:.0%} apart")
    if folder is not None:
        hf.save_pretrained(folder)
    return hf


def hf_engine(tokenizer):
    """A prepare.Tokenizer as tokenizers.Tokenizer: its own, or tiktoken's vocabulary rebuilt with
    every id in its place."""
    if not tokenizer.tiktoken:
        return tokenizer.engine
    from transformers.convert_slow_tokenizer import TikTokenConverter

    source = tokenizer.engine
    names = {i: token for token, i in source._special_tokens.items()}
    converter = TikTokenConverter(pattern=source._pat_str, extra_special_tokens=[*names.values()])
    converter.load_tiktoken_bpe = lambda _: source._mergeable_ranks
    vocab, merges = converter.extract_vocab_merges_from_model(None)
    for i in {*range(source.n_vocab)} - {*vocab.values()}:  # special tokens, and ids nobody has
        vocab[names.get(i, f"<|unused_{i}|>")] = i
    converter.extract_vocab_merges_from_model = lambda _: (vocab, merges)
    return converter.converted()


def write_transformers(folder, model, tokenizer):
    """Fill `folder` with configuration, weights, tokenizer and generation settings."""
    transformers.logging.disable_progress_bar()
    hf = to_transformers(model)
    for settings in (hf.config, hf.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = tokenizer.eot_id
    hf.generation_config.max_length = model.config.block_size  # beyond it nothing was trained
    hf.save_pretrained(folder)
    engine = hf_engine(tokenizer)
    engine.post_processor = None  # training adds no special token, whatever the tokenizer would
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    transformers.PreTrainedTokenizerFast(  # split_special_tokens: in text they are text
        tokenizer_object=engine, model_max_length=model.config.block_size,
        split_special_tokens=True, **dict.fromkeys(special, engine.id_to_token(tokenizer.eot_id)),
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"  # a name that transformers 4 knows too
    text = file.read_text("utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    file.write_text(text, "utf-8")


# --- out: GGUF -------------------------------------------------------------------------------

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# How a text is cut into words before its BPE: llama.cpp has a fixed list and knows them by name.
# Runs of 128 letters and more, which prepare.py cuts, are the one place where ids can differ.
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2", (GPT2_WORDS,): "gpt-2", (prepare.WORDS,): "gpt-2",
    (r"\p{L}{128}|[^\p{L}\s]{128}|\s{128}", "ByteLevel"): "gpt-2",  # prepare.py's until 2026-11
    (prepare.MARKED_WORDS,): "qwen35", ("Digits", "ByteLevel"): "smollm",
    (LLAMA3_WORDS,): "llama-bpe", (LLAMA3_WORDS.replace("{1,3}", ""),): "qwen2",
}


def gguf_bpe(saved):
    """A byte-level BPE's tokenizer.json as (vocabulary, merges, llama.cpp's name of its
    pre-tokenizer). Raises UserError for what llama.cpp would run differently."""
    steps = []
    settings = saved["pre_tokenizer"] or {}
    for step in settings.get("pretokenizers", [settings]):
        regex = step.get("pattern", {}).get("Regex")
        usual = {"add_prefix_space": False, "individual_digits": True, "behavior": "Isolated"}
        if any(step.get(key, value) != value for key, value in usual.items()):
            regex = "unknown"
        if regex or step.get("use_regex", True):
            steps.append(regex or step.get("type"))
    model = saved["model"]
    normalizer = (saved["normalizer"] or {}).get("type", "NFC")  # llama.cpp has none
    names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    odd = [name for name in names if model.get(name)]
    if model["type"] != "BPE" or odd or normalizer != "NFC" or tuple(steps) not in PRE_TOKENIZERS:
        raise UserError(f"GGUF has no name for this tokenizer ({model['type']}, {normalizer}, "
                        f"{steps}, {odd}), only for bpe, char, gpt2, SmolLM2, Qwen and Llama 3")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges, PRE_TOKENIZERS[tuple(steps)]


def gguf_characters(vocabulary):
    """A character vocabulary as gguf_bpe gives a BPE's: the bytes of each character, and merges
    that join them. A lead byte of UTF-8 stands nowhere else, so the merges cannot interfere.
    llama.cpp drops a character that is not in the vocabulary."""
    split = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    vocabulary = {split(char)[0][0]: i for char, i in vocabulary.items()}
    merges = dict.fromkeys(f"{t[:n]} {t[n]}" for t in vocabulary for n in range(1, len(t)))
    return vocabulary, [*merges], "gpt-2"


def add_tokenizer(writer, engine, size):
    """Write a tokenizers.Tokenizer, padded to `size` tokens, into a GGUF."""
    from gguf import TokenType

    saved = json.loads(engine.to_str())
    added = {token["content"]: token for token in saved["added_tokens"]}
    words = {}
    if saved["model"]["type"] == "WordLevel":
        words = {word: i for word, i in saved["model"]["vocab"].items() if word not in added}
    if max(map(len, words), default=0) == 1:
        vocabulary, merges, pre = gguf_characters(words)
    else:
        vocabulary, merges, pre = gguf_bpe(saved)
    tokens = [f"[unused {i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i] = token
        types[i] = TokenType.NORMAL
    for token, entry in added.items():
        tokens[entry["id"]] = token
        types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp refuses a file without merges, which a vocabulary of ASCII characters does not need.
    # This one never applies: no byte is written as this character.
    writer.add_token_merges(merges or ["\u2581 \u2581"])


def add_weights(writer, hf, c, dtype):
    """Write a transformers model's weights into a GGUF in the layouts and types that llama.cpp
    wants. c: its GPTConfig."""
    import gguf

    types = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[writer.arch.upper()], c.n_layer)
    for key, weight in hf.state_dict().items():
        if key == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        if writer.arch == "gpt2" and key.endswith(GPT2_TRANSPOSED):
            weight = weight.t()
        heads = {"q_proj": c.n_head, "k_proj": c.n_kv_head}.get(key.split(".")[-2])
        if writer.arch == "llama" and heads:  # it rotates neighbours, transformers halves
            weight = weight.view(heads, 2, -1, c.n_embd).transpose(1, 2).flatten(0, 2)
        kind = types[dtype.upper()]
        if weight.dim() == 1 or "wpe" in key:
            kind = types.F32
        elif kind == types.Q8_0 and weight.size(1) % 32:  # it comes in blocks of 32
            kind = types.F16
        data = gguf.quants.quantize(weight.contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), data, raw_dtype=kind)


def write_gguf(folder, model, tokenizer, name, dtype):
    """Fill `folder` with model.gguf and a Modelfile for Ollama."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("--format=gguf needs a package: pip install gguf") from None
    hf = to_transformers(model)
    c = model.config
    writer = gguf.GGUFWriter(folder / "model.gguf", hf.config.model_type)
    numbers = dict(
        file_type={"f32": 0, "f16": 1, "q8_0": 7}[dtype], quantization_version=2,
        vocab_size=c.vocab_size, context_length=c.block_size, embedding_length=c.n_embd,
        block_count=c.n_layer, feed_forward_length=c.n_inner, head_count=c.n_head,
        head_count_kv=c.n_kv_head, bos_token_id=tokenizer.eot_id, eos_token_id=tokenizer.eot_id,
    )
    if c.rope_theta is None:
        numbers |= dict(layer_norm_eps=c.norm_eps)
    else:
        numbers |= dict(layer_norm_rms_eps=c.norm_eps, key_length=c.head_dim,
                        value_length=c.head_dim, rope_dimension_count=c.head_dim,
                        rope_freq_base=c.rope_theta)
    writer.add_name(name)
    for key, value in numbers.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_add_bos_token(False)
    add_tokenizer(writer, hf_engine(tokenizer), c.vocab_size)
    add_weights(writer, hf, c, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lines = ["FROM ./model.gguf", 'TEMPLATE "{{ .Prompt }}"', f"PARAMETER num_ctx {c.block_size}"]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- the command -----------------------------------------------------------------------------


def main(cfg):
    """Write a checkpoint, or the one that sample.py would take of a run, into a new folder. It is
    whole or absent. Returns its Path."""
    check_range(cfg, 0)  # checks the choices alone
    run = Path(cfg.run)
    folder = Path(cfg.folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name another folder")
    checkpoint = run if (run / "meta.json").exists() else sample.pick_checkpoint(run)
    model, tokenizer, _ = sample.load_checkpoint(checkpoint)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            if cfg.format == "hf":
                write_transformers(temporary, model, tokenizer)
            else:
                write_gguf(temporary, model, tokenizer, folder.name, cfg.dtype)
            commit_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print0(f"{checkpoint} -> {folder}")
    return folder


if __name__ == "__main__":
    run_script(main, CFG)
