"""convert.py: against transformers, CTranslate2, gguf's own reader and, if there, llama.cpp.

LLAMA_CPP_PYTHON names a Python that has llama-cpp-python; without it those tests are skipped.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from conftest import needs_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

import convert
import prepare
import runtime
import sample
from convert import from_pretrained, to_transformers
from model import GPT, GPTConfig

pytestmark = pytest.mark.parity

GPT2 = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
LLAMA = replace(GPT2, bias=False, qkv_bias=False, rope_theta=500.0, rms_norm=True, swiglu=True,
                n_head=3, n_kv_head=3, head_dim=6, n_embd=15, n_inner=22, norm_eps=1e-6)
QWEN3 = replace(LLAMA, qk_norm=True, n_head=6, n_kv_head=2, n_embd=20, n_layer=3)
VARIANTS = {  # heads of odd sizes, n_embd that is not n_head * head_dim, 1, 2 and 3 groups
    "gpt2": GPT2,
    "gpt2-wide": replace(GPT2, n_head=3, head_dim=5, n_kv_head=3, n_embd=15, n_inner=21,
                         norm_eps=1e-6),
    "book": replace(GPT2, qkv_bias=False, tie_weights=False, init="torch"),
    "bare": replace(GPT2, bias=False, qkv_bias=False),
    "llama": LLAMA,
    "llama-grouped": replace(LLAMA, n_head=4, n_kv_head=2, n_embd=24, tie_weights=False),
    "qwen3": QWEN3,
    "qwen3-untied": replace(QWEN3, n_head=3, n_kv_head=1, tie_weights=False),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads make these tiny models slower, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(model, seed=0):
    """`model` in eval mode with weights, biases and norms far from where they start."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model.eval()


def tokens(rows, length, vocab_size=13):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def twin(kind="gpt2", **changes):
    """A tiny random model of transformers."""
    shared = dict(vocab_size=13, bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        shared |= dict(n_positions=8, n_embd=16, n_layer=2, n_head=2)
        return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shared | changes)))
    shared |= dict(max_position_embeddings=8, hidden_size=20, num_hidden_layers=3, head_dim=6,
                   num_attention_heads=4, num_key_value_heads=2, intermediate_size=21)
    classes = {"llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
               "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)}
    model_class, config_class = classes[kind]
    return randomize(model_class(config_class(**shared | changes)))


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# ---------------------------------------------------------------------------------------------
# weights


ROPE = {"rope_type": "default", "rope_theta": 77.0}


@pytest.mark.parametrize("kind, changes", [
    ("gpt2", {}), ("gpt2", dict(tie_word_embeddings=False, layer_norm_epsilon=1e-2, n_inner=21)),
    ("llama", dict(rope_parameters=ROPE)), ("llama", dict(num_key_value_heads=4, rms_norm_eps=0.1)),
    ("llama", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    ("qwen3", dict(rope_parameters=ROPE, tie_word_embeddings=True)),
    ("qwen3", dict(num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=0.1)),
    ("qwen3", dict(num_attention_heads=3, num_key_value_heads=3, head_dim=10)),
])
def test_weights_come_in_and_go_back(tmp_path, kind, changes):
    """A transposed matrix, rotated neighbours, a norm's epsilon, heads out of order; a file that is
    written differs in a bit."""
    hf = twin(kind, **changes)
    hf.save_pretrained(tmp_path, max_shard_size="5KB")  # in several files, as large ones are
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, idx = from_pretrained(str(tmp_path)), tokens(3, 8)
    assert ours.config.tie_weights == hf.config.tie_word_embeddings and not ours.training
    torch.testing.assert_close(ours(idx)[0], hf(idx).logits, atol=1e-5, rtol=0)
    to_transformers(ours, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(hf)
    assert_same_weights(hf.state_dict(), back.state_dict())
    greedy = sample.generate(ours, idx[:, :3], 5, temperature=0)
    theirs = hf.generate(idx[:, :3], attention_mask=torch.ones(3, 3), max_new_tokens=5,
                         do_sample=False)
    assert greedy.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_our_weights_go_out_and_come_back(tmp_path, name):
    """Biases that a model lacks must become zeros, an untied head must stay untied."""
    ours, idx = randomize(GPT(VARIANTS[name])), tokens(3, 8)
    to_transformers(ours, tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(hf(idx).logits, ours(idx)[0], atol=1e-5, rtol=0)
    back = from_pretrained(str(tmp_path), dropout=0.1)
    assert back.config == replace(ours.config, dropout=0.1, init=back.config.init,
                                  bias=back.config.bias, qkv_bias=back.config.qkv_bias)
    added = back.state_dict().keys() - ours.state_dict().keys()
    assert all(key.endswith("bias") and not back.state_dict()[key].any() for key in added)
    assert_same_weights(ours.state_dict(), {key: back.state_dict()[key] for key in
                                            ours.state_dict()})
    tied = back.lm_head.weight is back.transformer.wte.weight
    assert tied == ours.config.tie_weights


def test_files_that_old_versions_wrote(tmp_path):
    """The hub's gpt2 lacks the prefix and has masks; bf16 must become fp32; a head that says tied
    and is not must stay itself."""
    hf, idx = twin(), tokens(3, 8)
    hf.transformer.save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(load_file(file) | masks, file)
    ours = from_pretrained(str(tmp_path / "bare"))
    torch.testing.assert_close(ours(idx)[0], hf(idx).logits, atol=1e-5, rtol=0)

    hf = twin("llama", tie_word_embeddings=False, rope_parameters=ROPE)
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(p.bfloat16())
    hf.save_pretrained(tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    save_file({key: v.bfloat16() for key, v in load_file(file).items()}, file)
    file = tmp_path / "llama" / "config.json"
    said = json.loads(file.read_text()) | {"tie_word_embeddings": True, "rope_theta": 77.0}
    del said["rope_parameters"]  # transformers 4
    file.write_text(json.dumps(said | {"rope_scaling": None}))
    ours = from_pretrained(str(tmp_path / "llama"))
    assert ours.lm_head.weight.dtype == torch.float32 and ours.config.rope_theta == 77.0
    assert not ours.config.tie_weights
    torch.testing.assert_close(ours(idx)[0], hf(idx).logits, atol=1e-5, rtol=0)
    ours.train()(idx, idx)[1].backward()
    assert ours.transformer.wte.weight.grad is not None


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("tied", [False, True])
def test_embd_norm_is_folded_into_the_embedding(tied):
    """Would catch an export of the default recipe whose logits differ, or that changes the model; a
    tied head was refused."""
    model = GPT(replace(QWEN3, embd_norm=True, tie_weights=tied)).eval()
    randomize(model)
    before = model.transformer.wte.weight.clone()
    idx = tokens(3, 7)
    torch.testing.assert_close(to_transformers(model)(idx).logits, model(idx)[0],
                               atol=1e-5, rtol=1e-5)
    assert torch.equal(model.transformer.wte.weight, before) and model.config.embd_norm
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied



@pytest.mark.parametrize("kind, field, value", [
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "quantization_config", {"quant_method": "fp8"}),
    ("llama", "rope_parameters", LINEAR),
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "attention_bias", True),
    ("llama", "mlp_bias", True),
    ("llama", "hidden_act", "gelu"),
    ("qwen3", "attention_bias", True),
    ("qwen3", "use_sliding_window", True),
    ("qwen3", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    ("llama", "model_type", "mistral"),
    ("qwen3", "num_key_value_heads", 3),
    ("llama", "num_hidden_layers", 4),
    ("llama", "intermediate_size", 22),
    ("gpt2", "n_layer", 1),
])
def test_what_this_model_cannot_compute_is_refused(tmp_path, fails, kind, field, value):
    """Such a folder loads without a word and computes something else."""
    twin(kind).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text()) | {field: value}
    if field in ("rope_scaling", "partial_rotary_factor"):  # as transformers 4 says it
        del said["rope_parameters"]
    file.write_text(json.dumps(said))
    word = {"rope_parameters": "linear", "rope_scaling": "dynamic", "model_type": "mistral",
            "n_layer": "h.1.", "num_hidden_layers": "layers.3", "intermediate_size": "[20, 22]",
            "num_key_value_heads": "multiple", "use_sliding_window": "sliding"}.get(field, field)
    fails(1, lambda: from_pretrained(str(tmp_path)), word)


def test_folders_that_are_no_model(tmp_path, fails, monkeypatch):
    """A half-copied folder must not become a model with random parts."""
    (tmp_path / "empty").mkdir()
    fails(1, lambda: from_pretrained(str(tmp_path / "empty")), "config.json")
    fails(1, lambda: from_pretrained(str(tmp_path / "no")), "is no folder here")
    twin("qwen3").save_pretrained(tmp_path / "part", max_shard_size="5KB")
    sorted((tmp_path / "part").glob("model-*"))[1].unlink()
    fails(1, lambda: from_pretrained(str(tmp_path / "part")), "cannot load", "part")
    twin("qwen3").save_pretrained(tmp_path / "more")
    said = json.loads((tmp_path / "more" / "config.json").read_text())
    (tmp_path / "more" / "config.json").write_text(json.dumps(said | {"model_type": "llama"}))
    fails(1, lambda: from_pretrained(str(tmp_path / "more")), "k_norm")
    for text in ("{}", "[]", "{", "null"):
        (tmp_path / "more" / "config.json").write_text(text)
        fails(1, lambda: from_pretrained(str(tmp_path / "more")), "cannot load", "convert.py")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    fails(1, lambda: from_pretrained("somebody/nothing-like-it"), "cannot download")
    # a model in the hub's cache was refused without a network, before anybody looked
    monkeypatch.setattr(prepare, "require_network", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert convert.local_folder("owner/name") == tmp_path


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_stranger_runs_code(tmp_path, fails):
    """Weights are data: no pickle is read, no module that a config.json names is imported."""
    mark = tmp_path / "executed"
    torch.save({"lm_head.weight": Evil(mark)}, tmp_path / "evil.bin")
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the trap works
    mark.unlink()
    evils = {name: pickle.dumps(Evil(mark)) for name in ("model.safetensors", "config.json")}
    evils |= {name: (tmp_path / "evil.bin").read_bytes() for name in ("pytorch_model.bin", "x.pt")}
    for name, content in evils.items():
        folder = tmp_path / f"hf-{name}"
        twin().save_pretrained(folder)
        if name in ("pytorch_model.bin", "x.pt"):
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
        fails(1, lambda f=folder: from_pretrained(str(f)), "cannot load")
    folder = tmp_path / "named"
    twin().save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nGPT2LMHeadModel = 1\n")
    said = json.loads((folder / "config.json").read_text())
    said["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.GPT2LMHeadModel")
    said["attn_implementation"] = said["_attn_implementation"] = "somebody/kernel"
    (folder / "config.json").write_text(json.dumps(said))
    idx = tokens(2, 8)
    torch.testing.assert_close(from_pretrained(str(folder))(idx)[0], twin()(idx).logits)
    assert not mark.exists()


def test_a_changed_model_is_refused(fails, monkeypatch):
    """It would be published as something that computes another function."""
    for changes, words in ((dict(rms_norm=True), ("gpt2", "rms_norm True")),
                           (dict(rope_theta=9.0), ("llama", "rms_norm False", "bias True")),
                           (dict(n_kv_head=1), ("n_kv_head 1",)),
                           (dict(head_dim=6), ("head_dim 6",))):
        fails(1, lambda c=changes: to_transformers(GPT(replace(GPT2, **c))), "such", *words)
    fails(1, lambda: to_transformers(GPT(replace(LLAMA, n_embd=16))), "llama", "multiple")
    for config in (GPT2, QWEN3):
        gpt = randomize(GPT(config))
        gpt.transformer.h[0].scale = torch.nn.Parameter(torch.ones(1))
        fails(1, lambda g=gpt: to_transformers(g), "this model", "scale")
        gpt = randomize(GPT(config))
        del gpt.transformer.h[1].ln_2.weight
        fails(1, lambda g=gpt: to_transformers(g), "this model", ".1.")
        gpt = randomize(GPT(config)).train()
        monkeypatch.setattr(gpt.transformer.h[0].mlp.c_proj, "forward", lambda x: x[..., :1] ** 2)
        fails(1, lambda g=gpt: to_transformers(g), "logits", "apart")
        assert gpt.training


# ---------------------------------------------------------------------------------------------
# a run's folder


EXPORTED = ("gpt2", "book", "llama-grouped", "qwen3")
TEXTS = ["", "Every effort moves", " ə ğ ı İ ö ş ç\r\n\t\ufeff 🙂 I'll", "a<|endoftext|>b", "\x00",
         "日本語のテキスト、テスト。", "Bakı şəhərində hər gün 1000 nəfər", "  \n\n\t  \n x",
         "मुझे (किताबें)\r\n\r\nबहुत e\u0301 ไม่ 12"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """prepare.py's own tokenizers of a little real text: {"bpe": engine, "char": ..}."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = Path(json.__file__).read_text("utf-8") + "".join(TEXTS)
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    made = {}
    for kind, size in (("bpe", 400), ("char", None)):
        prepare.main(prepare.Config(kind, source=(str(folder / "text.txt"),), tokenizer=kind,
                                    vocab_size=size, data_dir=str(folder)))
        made[kind] = prepare.load_tokenizer(folder / kind).engine
    made["bpe"].post_processor = processors.TemplateProcessing(  # would add one to every text
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {"smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level]}
    for kind, words in (("qwen2", convert.LLAMA3_WORDS.replace("{1,3}", "")),
                        ("llama-bpe", convert.LLAMA3_WORDS)):
        splits[kind] = [pre_tokenizers.Split(Regex(words), "isolated"), plain]
    for kind, steps in splits.items():
        made[kind] = Tokenizer.from_str(made["bpe"].to_str())
        made[kind].pre_tokenizer = pre_tokenizers.Sequence(steps)
    hindi = [("train", "किताबें पढ़ना मुझे बहुत अच्छा लगता है। " * 50 + text, False)]
    made["marked"] = prepare.make_tokenizer("bpe", lambda: hindi, 1, 400).engine
    ascii_only = [("train", "".join(map(chr, range(128))), False)]  # no character needs a merge
    made["ascii"] = prepare.make_tokenizer("char", lambda: ascii_only).engine
    return made


def checkpoint(folder, config, engine=None, name="tokenizer.json", eot_id=0, vocab_size=400):
    """A checkpoint folder as train.py writes it; returns its model."""
    temporary = folder.with_name(".tmp-making")
    temporary.mkdir(parents=True)
    gpt = randomize(GPT(config))
    state = gpt.state_dict()
    if config.tie_weights:
        del state["lm_head.weight"]
    save_file(state, temporary / "model.safetensors")
    train = {"dataset": "mine", "init_from": "/home/somebody/base"}
    run = {"model": asdict(config), "train": train, "iter": 1234, "train_loss": 1.25,
           "val_loss": 2.5}
    meta = {"tokenizer": name, "vocab_size": vocab_size, "eot_id": eot_id, "format_version": 1,
            "train_tokens": 98765, "val_tokens": 4321, "train_bytes": 3, "val_bytes": 3,
            "dtype": "uint16", "source": "/home/somebody/secret/book.txt", "source_sha256": "0"}
    for file, content in (("run.json", run), ("meta.json", meta)):
        (temporary / file).write_text(json.dumps(content), encoding="utf-8")
    if engine is not None:
        engine.save(str(temporary / "tokenizer.json"))
    runtime.commit_folder(temporary, folder)
    return gpt


@pytest.fixture(scope="module")
def exported(tmp_path_factory, engines):
    """{variant: (our model, exported folder)} of byte-level models, all through main."""
    root, made = tmp_path_factory.mktemp("export"), {}
    for name in EXPORTED:
        config = replace(VARIANTS[name], vocab_size=400, block_size=32)
        checkpoint(root / name / "checkpoint-000010", GPT2, engines["bpe"])
        gpt = checkpoint(root / name / "checkpoint-000020", config, engines["bpe"])
        folder = convert.main(convert.Config(str(root / name), str(root / f"out-{name}")))
        made[name] = gpt, folder
    return made


@pytest.mark.parametrize("name", EXPORTED)
def test_export_is_a_transformers_folder(exported, engines, name):
    """Equal logits and token ids, or somebody serves another model than was trained."""
    ours, folder = exported[name]
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == engines["bpe"].encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    idx = torch.tensor([tokenizer("Every effort")["input_ids"]])
    torch.testing.assert_close(hf(idx).logits, ours(idx)[0], atol=1e-5, rtol=0)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 has no other
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == hf.config.eos_token_id == 0
    assert hf.generation_config.max_length == 32
    greedy = sample.generate(ours, idx, 32 - idx.size(1), temperature=0, eos_id=0)
    assert hf.generate(idx, do_sample=False).tolist()[0] == greedy.tolist()[0]
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    text = pipe("Every effort", do_sample=False)[0]["generated_text"]  # stops at 32 tokens
    assert text == tokenizer.decode(greedy[0], skip_special_tokens=True)
    assert runtime.verify_checksums(folder) is None


def test_what_other_programs_read(exported):
    """vLLM and mlx-lm take a default of their own where a field is missing."""
    said = json.loads((exported["qwen3"][1] / "config.json").read_text(encoding="utf-8"))
    wanted = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=6,
                  rope_theta=500.0, attention_bias=False, tie_word_embeddings=True,
                  num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-6,
                  bos_token_id=0, eos_token_id=0, pad_token_id=0, dtype="float32",
                  hidden_act="silu", use_sliding_window=False, intermediate_size=22)
    assert {key: said.get(key) for key in wanted} == wanted
    assert said["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}


def check_tiktoken_export(source, folder):
    """Export a model with the vocabulary `source`; AutoTokenizer must give its ids, on any text."""
    config = replace(GPT2, vocab_size=source.n_vocab)
    checkpoint(folder / "run" / "best", config, None, source.name, source.eot_token, source.n_vocab)
    (folder / "run" / "model.safetensors").touch()  # a RoBERTa's, before --overwrite
    convert.main(convert.Config(str(folder / "run"), str(folder / "out")))
    ours = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert len(ours) == source.n_vocab and ours.eos_token_id == source.eot_token

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=40) | st.text("hello' sl1\n\r\t.,ə🙂<|>", max_size=40))
    def same_ids(text):
        ids = source.encode(text, disallowed_special=())
        assert ours(text)["input_ids"] == ids and ours.decode(ids) == text

    code = Path(__file__).read_text(encoding="utf-8")
    for text in [*TEXTS, code, "x" * 50, "3141592653", "Zoë's 世界 Ω≈ç√ ไทย हिन्दी"]:
        same_ids.hypothesis.inner_test(text)
    same_ids()


@needs_gpt2
def test_export_of_the_gpt2_vocabulary(tmp_path):
    """Rebuilt from the ranks: a merge out of order shows here."""
    check_tiktoken_export(tiktoken.get_encoding("gpt2"), tmp_path)


def test_export_of_a_vocabulary_with_gaps(tmp_path, monkeypatch):
    """As p50k_base and cl100k_base have: a special token in the middle, ids that nobody has."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"he": 256, b"ll": 257, b"hell": 259, b"hello": 261, b" s": 262}
    special = {"<|endoftext|>": 258, "<|endofprompt|>": 266}
    source = tiktoken.Encoding(
        "p50k_base", pat_str=r"\s?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"p50k_base": source}[name])
    check_tiktoken_export(source, tmp_path)


def test_the_data_must_have_the_tokens_of_the_weights(exported, engines, tmp_path, fails, capsys):
    """A model fine-tuned on another tokenizer's ids learns nothing, slowly."""
    folder = str(exported["llama-grouped"][1])
    own = convert.load_tokenizer(folder)
    assert isinstance(own, prepare.Tokenizer) and own.eot_id == 0
    assert own.encode("<|endoftext|>") != [0]
    convert.check_same_tokenizer(folder, own)
    other = prepare.Tokenizer("tokenizer.json", engines["char"])
    fails(2, lambda: convert.check_same_tokenizer(folder, other), "--tokenizer=", folder)
    convert.check_same_tokenizer(str(tmp_path), other)
    assert "warning" in capsys.readouterr().out


def test_ctranslate2_takes_the_export(exported, tmp_path):
    """A runtime that knows nothing of us: greedy text must agree."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install ctranslate2 to run this")
    for name, (ours, folder) in exported.items():
        out = tmp_path / name
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out))
        generator = ctranslate2.Generator(str(out), device="cpu", compute_type="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Every effort moves")["input_ids"]
        result = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)], max_length=12, sampling_topk=1, beam_size=1,
            include_prompt_in_result=False)
        greedy = sample.generate(ours, torch.tensor([ids]), 12, temperature=0, eos_id=0)
        greedy = greedy[0, len(ids):].tolist()
        end = greedy.index(0) if 0 in greedy else None
        assert result[0].sequences_ids[0] == greedy[:end], name


def test_command(tmp_path, engines, fails, run, monkeypatch):
    """Wrong calls are one line, and leave what is there alone; a full disk leaves nothing."""
    checkpoint(tmp_path / "run" / "best", replace(GPT2, vocab_size=400), engines["bpe"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    best = tmp_path / "run" / "best"

    def export(*words, **more):
        return lambda: convert.main(convert.Config(*map(str, words), **more))

    fails(1, export(tmp_path / "no", tmp_path / "x"), "no", "checkpoint")
    fails(1, export(best, tmp_path / "full"), "not empty")
    (best / "meta.json").rename(tmp_path / "meta.json")
    fails(1, export(best, tmp_path / "x"), "run/best")
    (tmp_path / "meta.json").rename(best / "meta.json")

    def full(self, folder):
        (Path(folder) / "half").write_text("...")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
        fails(1, export(best, tmp_path / "x"), "No space left", str(tmp_path / "x"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        fails(1, export(best, tmp_path / "x", format="gguf"), "pip install gguf")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"]

    (tmp_path / "x").mkdir()  # an empty folder is fine
    done = run("convert.py", "run", "x", "--format=gguf", "--dtype", "f32")
    assert done.returncode == 0 and "run/best -> " in done.stdout, done.stderr
    assert (tmp_path / "x" / "model.gguf").exists()
    for words in (["run"], ["run", "y", "z"], ["run", "y", "--format=onnx"]):
        wrong = run("convert.py", *words)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: "), words
    assert run("convert.py", "--help").returncode == 0


# ---------------------------------------------------------------------------------------------
# GGUF


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory, engines):
    """{(variant, tokenizer): (our model, its engine, {dtype: file})}, vocabularies padded."""
    pytest.importorskip("gguf", reason="pip install gguf to run this")
    root, made = tmp_path_factory.mktemp("gguf"), {}
    for name, kind in (("gpt2", "bpe"), ("bare", "char"), ("llama", "bpe"), ("qwen3", "bpe"),
                       ("llama-grouped", "char"), ("qwen3-untied", "qwen2"), ("llama", "smollm"),
                       ("llama-grouped", "llama-bpe"), ("gpt2", "ascii"), ("qwen3", "marked")):
        engine = engines[kind]
        size = engine.get_vocab_size()
        config = replace(VARIANTS[name], vocab_size=size + 3, block_size=64, n_inner=64,
                         embd_norm=name == "qwen3",  # with a tied head, which gets its own
                         n_embd=96 if name == "bare" else VARIANTS[name].n_embd,
                         head_dim=48 if name == "bare" else VARIANTS[name].head_dim)
        eot_id = engine.token_to_id("<|endoftext|>")
        gpt = checkpoint(root / f"{name}-{kind}", config, engine, eot_id=eot_id, vocab_size=size)
        files = {}
        for dtype in ("f32", "f16", "q8_0"):
            folder = root / f"{name}-{kind}-{dtype}"
            cfg = convert.Config(str(root / f"{name}-{kind}"), str(folder), "gguf", dtype)
            files[dtype] = convert.main(cfg) / "model.gguf"
        made[name, kind] = gpt, engine, files
    return made


def test_gguf_read_back(ggufs):
    """A field or a shape that llama.cpp would miss, a table of the wrong type, Q8_0 far off."""
    import gguf

    for (name, _), (gpt, engine, files) in ggufs.items():
        c = gpt.config
        exact = {}
        for dtype, file in files.items():
            reader = gguf.GGUFReader(file)
            said = {key: field.contents() for key, field in reader.fields.items()}
            arch = said["general.architecture"]
            assert arch in ("gpt2", "llama", "qwen3") and name.startswith(arch) or name == "bare"
            wanted = {"context_length": 64, "embedding_length": c.n_embd, "block_count": c.n_layer,
                      "feed_forward_length": 64, "attention.head_count": c.n_head,
                      "attention.head_count_kv": c.n_kv_head, "vocab_size": c.vocab_size}
            if arch != "gpt2":
                wanted |= {"attention.key_length": c.head_dim, "rope.freq_base": c.rope_theta,
                           "rope.dimension_count": c.head_dim}
            assert {key: said[f"{arch}.{key}"] for key in wanted} == wanted
            assert said["general.file_type"] == {"f32": 0, "f16": 1, "q8_0": 7}[dtype]
            assert said["tokenizer.ggml.eos_token_id"] == engine.token_to_id("<|endoftext|>")
            texts, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
            assert len(texts) == len(types) == len(set(texts)) == c.vocab_size
            assert types[-3:] == [5] * 3 and types.count(3) == 1
            for tensor in reader.tensors:
                data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                if dtype == "f32":
                    exact[tensor.name] = data
                    assert tensor.tensor_type.name == "F32"
                elif data.ndim == 1 or tensor.name == "position_embd.weight":
                    assert (data == exact[tensor.name]).all()
                else:
                    fine = tensor.tensor_type.name == "F16"
                    assert fine == (dtype == "f16" or data.shape[1] % 32 > 0)
                    error = abs(data - exact[tensor.name]).max()
                    assert error < (2e-3 if fine else 0.02) * abs(data).max(), tensor.name
            total = sum(tensor.n_elements for tensor in reader.tensors)
            biases = 0 if arch != "gpt2" or c.bias else total - gpt.count_parameters()
            head = c.vocab_size * c.n_embd if c.embd_norm and c.tie_weights else 0
            assert total == gpt.count_parameters() + biases + head


@pytest.mark.parametrize("part, value, word", [
    ("pre_tokenizer", pre_tokenizers.Whitespace(), "Whitespace"),
    ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "unknown"),
    ("normalizer", normalizers.Lowercase(), "Lowercase"),
    ("model", models.BPE({"a@": 0, "<|endoftext|>": 1}, [], end_of_word_suffix="@"), "end_of"),
    ("model", models.Unigram([("<|endoftext|>", 0.0)], 0), "Unigram"),
])
def test_tokenizers_that_gguf_cannot_name(engines, part, value, word):
    """llama.cpp would cut the words in other places, without a word."""
    engine = Tokenizer.from_str(engines["bpe"].to_str())
    setattr(engine, part, value)
    with pytest.raises(runtime.UserError, match=f"GGUF.*{word}"):
        convert.add_tokenizer(None, engine, 400)


LLAMA_CPP = """
import json, sys
import llama_cpp
for file, texts in json.load(sys.stdin).items():
    model = llama_cpp.Llama(file, n_ctx=64, n_threads=1, logits_all=True, verbose=False,
                            type_k=0, type_v=0)  # keys and values in fp32
    ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    again = [model.detokenize(row).decode("utf-8", "replace") for row in ids]
    prompt, greedy = ids[0][:12], []
    model.eval(prompt)
    logits = model.scores[: len(prompt)].tolist()
    for _ in range(20):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    print(json.dumps([file, ids, again, logits, greedy]))
"""


def llama_cpp_python():
    """A Python that has llama-cpp-python, or None."""
    here = sys.executable if importlib.util.find_spec("llama_cpp") else None
    return os.environ.get("LLAMA_CPP_PYTHON", here)


@pytest.mark.skipif(not llama_cpp_python(), reason="LLAMA_CPP_PYTHON names no such Python")
def test_llama_cpp_agrees(ggufs):
    """The tokens, logits and greedy text of llama.cpp are ours: nobody else reads these files."""
    texts = [Path(json.__file__).read_text("utf-8"), *TEXTS[1:]]
    files = {str(f): texts for _, _, files in ggufs.values() for f in files.values()}
    done = subprocess.run([llama_cpp_python(), "-c", LLAMA_CPP], input=json.dumps(files), text=True,
                          capture_output=True, timeout=600, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {file: rest for file, *rest in map(json.loads, done.stdout.splitlines())}
    for (name, kind), (gpt, engine, files) in ggufs.items():
        engine.encode_special_tokens = True
        for dtype, file in files.items():
            ids, again, logits, greedy = answers[str(file)]
            for text, row, back in zip(texts, ids, again, strict=True):
                if kind == "ascii" and not text.isascii():  # llama.cpp drops what is not in there
                    continue
                wanted = engine.encode(text, add_special_tokens=False).ids
                assert row == wanted, (name, kind, text[:30])
                assert text.startswith("\x00") or back == text
            idx = torch.tensor([ids[0][:12]])
            ours = gpt(idx)[0][0]
            error = (torch.tensor(logits) - ours).abs().max() / ours.abs().max()
            # llama.cpp looks GELU up in a table, and rounds activations as it does weights
            assert error < {"f32": 1e-3, "f16": 1e-2, "q8_0": 0.15}[dtype], (name, dtype, error)
            if dtype == "f32":
                text = sample.generate(gpt, idx, 20, temperature=0)[0, 12:]
                assert greedy == text.tolist(), (name, dtype)
