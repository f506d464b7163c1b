"""PEFT's comparison runs with each method, and writes the fields of PEFT's own results."""

import json

import pytest

from benchmarks import peft_image

# The fields of results/lora--flux2-klein-default.json of PEFT 0.20
FIELDS = {
    "run_info": {
        "created_at",
        "total_time",
        "experiment_name",
        "peft_branch",
        "train_config",
        "peft_config",
        "error_msg",
    },
    "train_info": {
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "train_time",
        "file_size",
        "num_trainable_params",
        "num_total_params",
        "status",
        "metrics",
    },
    "meta_info": {
        "model_info",
        "dataset_info",
        "package_info",
        "system_info",
        "pytorch_info",
    },
}
QUICK = {
    "resolution": 64,
    "max_steps": 2,
    "eval_steps": 1,
    "num_inference_steps": 1,
    "valid_size": 1,
    "test_size": 1,
    "drift_image_prompts": ["a photo of a red duck in the snow"],
}


def test_photos_are_held_out_as_peft_holds_them_out():
    pictures = peft_image.Pictures(list(range(20)), [str(n) for n in range(20)])
    training, valid, test = peft_image.split(pictures, valid=2, test=4)
    assert sorted(training.files + valid.files + test.files) == list(range(20))
    assert valid.files == [16, 11] and test.files == [3, 0, 15, 12]
    assert test.prompts == [str(n) for n in test.files]


@pytest.mark.slow
def test_each_method_learns_and_its_file_has_the_fields_of_pefts(tmp_path, capsys):
    params = tmp_path / "params.json"
    params.write_text(json.dumps(QUICK))
    command = ["--params", str(params), "--out", str(tmp_path / "out")]
    peft_image.main(command)
    said = capsys.readouterr().out
    numbers = {}
    for arm in peft_image.ARMS:
        found = json.loads((tmp_path / "out" / "results" / f"{arm}--seed0.json").read_text())
        assert {name: set(part) for name, part in found.items()} == FIELDS
        first, last = found["train_info"]["metrics"]
        assert -1 <= first["valid dino_similarity"] <= 1 and 0 <= last["drift"] <= 2
        assert last["drift"] > 0 and found["train_info"]["file_size"] > 0
        numbers[arm] = found["train_info"]["num_trainable_params"]
        assert f"| {arm} | {numbers[arm]:,} |" in said
    assert 0.95 * numbers["lora"] < numbers["moslora"] <= numbers["lora"]
    assert numbers["lokr"] < numbers["lora"]

    # A second call runs nothing again.
    peft_image.main(command)
    assert '"train loss"' not in capsys.readouterr().out
