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
from tests.adapters.test_lora_file import shaken

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
WORDS = torch.arange(8)[None]
PROGRAM = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    model = PeftModel.from_pretrained(base, f"{folder}/plain").eval()
    torch.save(model(torch.arange(8)[None]).logits, f"{folder}/logits.pt")
assert "dreambooth_moslora" not in sys.modules
"""


def save_adapter(folder: Path, mixer: str) -> torch.Tensor:
    """Write `own`, an adapter that PEFT saves, and its `base`; returns the logits."""
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    model.save_pretrained(folder / "base")
    kind = {"mixer": mixer, "mixer_factor": 2, "rank_pattern": {"q_proj": 2}, "task_type": "CAUSAL_LM"}
    config = MoSLoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"], **kind)
    adapted = shaken(model, config).eval()
    adapted.save_pretrained(folder / "own")
    with torch.no_grad():
        return adapted(WORDS).logits


def exported(source, *words) -> int:
    return main(["export", str(source), "--out", str(source.parent / "plain"), *words])


@pytest.mark.slow
def test_plain_peft_computes_the_same_logits(tmp_path, capsys):
    """In a program that does not import this package."""
    wanted = {tmp_path / mixer: save_adapter(tmp_path / mixer, mixer) for mixer in ("orthogonal", "kronecker")}
    for folder in wanted:
        assert exported(folder / "own", "--for", "peft") == 0
        assert "4 layers folded" in capsys.readouterr().out
        settings = json.loads((folder / "plain" / "adapter_config.json").read_text())
        assert settings.keys() <= LoraConfig().to_dict().keys()
    subprocess.run([sys.executable, "-c", PROGRAM, *wanted], check=True, cwd=tmp_path)
    assert all(torch.allclose(torch.load(folder / "logits.pt"), logits, atol=1e-5) for folder, logits in wanted.items())


def test_what_peft_does_not_need_folded_is_refused_in_one_line(tmp_path, capsys):
    save_adapter(tmp_path, "orthogonal")
    capsys.readouterr()  # transformers shows how it writes
    folder = tmp_path / "own"

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
