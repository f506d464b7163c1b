"""`export --for peft`: a language model's adapter for a PEFT that knows nothing of mixers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dreambooth_moslora.adapters.moslora import MoSLoraConfig
from dreambooth_moslora.cli.main import main
from tests.adapters.test_key_names import shaken

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
WORDS = torch.arange(8)[None]
PROGRAM = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
torch.save(model(torch.arange(8)[None]).logits, sys.argv[3])
assert "dreambooth_moslora" not in sys.modules
"""


@pytest.fixture(params=["orthogonal", "kronecker"])
def adapter(request, tmp_path) -> tuple[Path, torch.Tensor]:
    """The folder of an adapter that PEFT saved, and the logits of its model, whose base is beside it."""
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    model.save_pretrained(tmp_path / "base")
    kind = {"mixer": request.param, "mixer_factor": 2, "rank_pattern": {"q_proj": 2}, "task_type": "CAUSAL_LM"}
    config = MoSLoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"], **kind)
    adapted = shaken(model, config).eval()
    adapted.save_pretrained(tmp_path / "own")
    with torch.no_grad():
        return tmp_path / "own", adapted(WORDS).logits


def exported(source, *words) -> int:
    return main(["export", str(source), "--out", str(source.parent / "plain"), *words])


def test_plain_peft_computes_the_same_logits(adapter, capsys):
    """In a program that does not import this package."""
    folder, wanted = adapter
    assert exported(folder, "--for", "peft") == 0
    assert "4 layers folded" in capsys.readouterr().out
    paths = [folder.parent / name for name in ("base", "plain", "logits.pt")]
    subprocess.run([sys.executable, "-c", PROGRAM, *paths], check=True, cwd=folder.parent)
    assert torch.allclose(torch.load(paths[2]), wanted, atol=1e-5)
    assert json.loads((paths[1] / "adapter_config.json").read_text()).keys() <= LoraConfig().to_dict().keys()


def test_what_peft_does_not_need_folded_is_refused_in_one_line(adapter, tmp_path, capsys):
    folder, _ = adapter

    def refused(source, said, *words):
        assert exported(source, *words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1

    refused(folder, "is an adapter of PEFT: add --for peft")
    refused(tmp_path / "base", "holds no adapter_config.json", "--for", "peft")
    refused(folder, "--out", "--for", "peft", "--out", str(folder))
    get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SIZES)), LoraConfig(r=2)).save_pretrained(
        tmp_path / "lora"
    )
    refused(tmp_path / "lora", "is of the type 'LORA', which PEFT loads as it is", "--for", "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[next(key for key in tensors if key.endswith(".mixer"))]
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, "is not whole", "--for", "peft")
