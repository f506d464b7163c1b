# The page on a machine with an Nvidia GPU. It has not been built or run yet.
#
#   docker build -t dreambooth-moslora .
#   docker run --gpus all -p 127.0.0.1:7860:7860 -v "$PWD/runs:/app/runs" -v moslora-hub:/hub dreambooth-moslora \
#       --base stabilityai/stable-diffusion-xl-base-1.0 --auth me:a-long-password
#
# In a container the page listens on all addresses, so it needs the login of --auth, or --public, with which it only
# draws. To train without the page:
#
#   docker run --gpus all -v "$PWD:/data" -v moslora-hub:/hub --entrypoint python3 dreambooth-moslora \
#       train_dreambooth.py --config assets/configs/sdxl.toml --instance_data_dir /data/photos/dog \
#       --instance_prompt "a photo of sks dog" --output_dir /data/runs/dog
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04@sha256:ebef3c171eeef0298e4eb2e4be843105edf3b8b0ac45e0b43acee358e8046867

# gcc and Python.h are for --compile: Triton builds its launcher with them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH HF_HOME=/hub PYTHONUNBUFFERED=1 GRADIO_ANALYTICS_ENABLED=False

WORKDIR /app
# Exact versions with the digests of their files, and no tools of the tests. deploy/serve.lock has Ray's too, for the
# service (deploy/compose.yaml).
ARG LOCK=deploy/page.lock
COPY ${LOCK} ./
RUN pip install --no-cache-dir --require-hashes -r "$(basename ${LOCK})"
COPY . .

# The user of most machines' first account, so that mounted folders can be written; another: docker run --user.
RUN mkdir -p runs /hub && chown 1000:1000 runs /hub
USER 1000
VOLUME ["/app/runs", "/hub"]
EXPOSE 7860
HEALTHCHECK --start-period=5m CMD ["python3", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/', timeout=5)"]
ENTRYPOINT ["python3", "app.py", "--server_name", "0.0.0.0", "--server_port", "7860"]
