#!/usr/bin/env bash
# Not run: no RunPod account was at hand. That the program takes its command is tested.
#
# The start command of a RunPod pod: image `runpod/pytorch` with CUDA 12.8, a volume at /workspace with a clone of this
# repository and the adapters, port 8000/http open, DREAMBOOTH_TOKEN from RunPod's secrets. RunPod's proxy adds HTTPS.
set -euo pipefail
cd /workspace/dreambooth_moslora
export HF_HOME=/workspace/hub
python -m venv --system-site-packages /workspace/venv
source /workspace/venv/bin/activate
pip install -q -r requirements.txt "ray[serve]>=2.60,<3"
python -m dreambooth_moslora serve --adapters /workspace/adapters --host 0.0.0.0 --port 8000 --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0
