#!/usr/bin/env bash
# The published file in an old, untouched diffusers: same output as the live adapter to 1e-5 of its effect.
#
#     bash tests/helpers/compat_old_versions.sh [FOLDER]
#
# Makes an environment with diffusers 0.29 and peft 0.11 in FOLDER (default: a temporary one), lets today's versions
# write adapters and the change that each makes to a small SDXL UNet, and computes the same change in the old one.
# Not in CI: it downloads a torch (OLD_TORCH pins one). PYTHON is today's interpreter, OLD_PYTHON one of 3.10 or 3.11.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-$(mktemp -d)}
python=${PYTHON:-python}
old=$folder/old/bin/python
mkdir -p "$folder"
if [ ! -x "$old" ]; then
    ${OLD_PYTHON:-$python} -m venv "$folder/old"
    "$old" -m pip install -q "diffusers==0.29.2" "peft==0.11.1" "transformers==4.41.2" "accelerate==0.31.0" \
        "huggingface_hub==0.23.4" "safetensors==0.4.3" "numpy<2" "${OLD_TORCH:-torch}"
fi
"$python" -m tests.helpers.compat_old_versions write "$folder/files"
HF_HOME=$folder/hf HF_HUB_OFFLINE=1 "$old" tests/helpers/compat_old_versions.py read "$folder/files"
