"""racer.py: value embeddings in a fork of the model, through train.py and sample.py."""

import copy

import pytest
import torch

import fast
import racer
import sample
import train
from model import GPT, GPTConfig

SHAPE = dict(vocab_size=29, block_size=15, n_head=4, n_kv_head=2, n_embd=24, rope_theta=1e4)


def test_values_follow_their_tokens():
    """Would catch embeddings added to queries or keys, or to a step's token only, and a gate that
    nothing reaches."""
    torch.manual_seed(0)
    model = racer.Racer(GPTConfig(n_layer=3, **SHAPE)).eval()
    for p in model.gates.parameters():
        torch.nn.init.normal_(p)
    idx = torch.randint(29, (2, 11))
    cache = sample.KVCache(model, 2, 15)
    sample.next_logits(model, idx[:, :4], cache)
    for end in (5, 6, 9, 11):
        one = sample.next_logits(model, idx[:, :end], cache)
        torch.testing.assert_close(one, model(idx[:, :end])[0][:, -1], atol=1e-4, rtol=1e-4)
    model.idx = idx
    x = torch.randn(2, 11, 24)
    layer = model.transformer.h[-1].attn.c_attn
    qkv = layer(x)
    plain = layer.c_attn(x)
    added = (qkv - plain)[..., -12:].unflatten(-1, (2, 6))  # nkv heads of hs
    torch.testing.assert_close(qkv[..., :-12], plain[..., :-12])
    gate = 2 * torch.sigmoid(model.gates[-1](x))  # n_embd is below 32
    table = model.transformer["wve"][-1]
    wanted = racer.SCALE * table(idx).unflatten(-1, (2, 6)) * gate[..., None]
    torch.testing.assert_close(added, wanted, atol=1e-5, rtol=1e-5)
    logits = model(idx)[0]
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(model.transformer["wve"][0].weight)  # the copy has its own
    assert torch.equal(other(idx)[0], logits) and not torch.equal(model(idx)[0], logits)
    quantized = fast.quantize(other, "int8")(idx)[0]
    assert 0 < (quantized - logits).norm() < 0.1 * logits.norm()


def test_a_run(data_dir, tmp_path, monkeypatch, fails):
    """The tables learn at an embedding's rate, the gates learn too; what saves it, loads it."""
    fails(2, lambda: racer.main(racer.Config(init_from="gpt2")), "--init_from")
    settings = dict(block_size=15, n_layer=2, n_head=2, n_embd=12, batch_size=3, dropout=0.2,
                    eval_iters=1, sample_tokens=3, mixed_precision="no")
    made = train.make_optimizers
    rates = {}

    def look(model, cfg, device):
        optimizers = made(model, cfg, device)
        names = {id(p): name for name, p in model.named_parameters()}
        rates.update({names[id(p)]: group.get("lr_scale", 1.0) for optimizer in optimizers
                      for group in optimizer.param_groups for p in group["params"]})
        return optimizers

    monkeypatch.setattr(train, "make_optimizers", look)
    folder = str(tmp_path / "run")
    result = racer.main(racer.Config("tiny", str(data_dir), folder, max_iters=6, **settings))
    assert rates["transformer.wve.1.weight"] == 2.0 and rates["gates.1.weight"] == 1.0
    assert train.GPT is GPT  # for the next train.main in a notebook
    weights = result["model"].state_dict()
    assert weights["gates.1.weight"].all()  # they begin at 0
    with pytest.raises(sample.UserError, match="cannot be loaded: .* racer.py"):
        sample.load_run(folder)
    monkeypatch.setattr(sample, "GPT", racer.Racer)
    model, tokenizer, _ = sample.load_run(folder)
    assert all(torch.equal(a, weights[name]) for name, a in model.state_dict().items())
    assert len(sample.complete(model, tokenizer, "a", sample.Config(max_new_tokens=4))) == 1
