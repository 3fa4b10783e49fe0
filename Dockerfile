# A CUDA development image: DeepSpeed compiles operators at the first use (CPUAdam for offload), for which it asks for the
# CUDA version that torch was built with. The pip wheels of torch 2.13 are built with CUDA 13.0 and bring their own cuDNN.
# The digest keeps the tag from moving: it is the multi-platform index of this tag as of September 2026.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-devel-ubuntu24.04@sha256:b7ae301dea2c162444795462ce17a05f6a516e5a75944b57af5b88540a1a2266
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="llmops-deepspeed-backend" \
    org.opencontainers.image.description="Fine-tune chat models with DeepSpeed, LoRA or full" \
    org.opencontainers.image.version="0.2.0" \
    org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# python3-dev and the compiler: DeepSpeed's and Triton's operators; libaio: offload to NVMe; the font: Chinese in pictures.
# Versions follow the base image, which is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates fonts-wqy-microhei libaio-dev python3 python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Packages before the source: editing the source does not install them again.
# An empty PIP_INDEX_URL means pip's default; --build-arg PIP_INDEX_URL=... takes a mirror that asks for no password: build
# arguments stay in the image's history. A mirror with a password comes as a secret, which is in no layer and no history:
# --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
ARG PIP_INDEX_URL=""
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.txt /tmp/requirements.txt
RUN --mount=type=secret,id=pip.conf,target=/root/.config/pip/pip.conf \
    case $PIP_INDEX_URL in \
    *@*) \
        echo "error: PIP_INDEX_URL holds a name or password, and build arguments stay in the image's history;" \
            "pass a pip.conf as a secret: --secret id=pip.conf,src=FILE" >&2 \
        && exit 2 \
        ;; \
    esac \
    && python3 -m venv /opt/venv \
    && pip install --no-cache-dir --disable-pip-version-check --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Caches in a folder that any user may write to, because --user can be anyone; LOGNAME for users without an account.
# Docker's -p reaches the container's own address and not its loopback, so in here both servers listen on all addresses;
# who may reach it is decided by -p (-p 127.0.0.1:6006:6006 keeps it on the host).
ENV HOME=/var/cache/llmops \
    LOGNAME=llmops \
    LANG=C.UTF-8 \
    HF_HOME=/var/cache/llmops/huggingface \
    MPLCONFIGDIR=/var/cache/llmops/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/llmops/torchinductor \
    TORCH_EXTENSIONS_DIR=/var/cache/llmops/torch_extensions \
    TRITON_CACHE_DIR=/var/cache/llmops/triton \
    XDG_CACHE_HOME=/var/cache/llmops \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MOUNT_PATH=/app/mnt \
    CONSOLE_HOST=0.0.0.0 \
    SERVE_HOST=0.0.0.0 \
    TENSORBOARD_HOST=0.0.0.0
RUN install --directory --mode=1777 /var/cache/llmops \
    && install --directory --owner=1000 --group=1000 /app/mnt

WORKDIR /app
COPY . .

USER 1000:1000
# 6006: TensorBoard while training runs; 5000: the model server and the console, which ask for a token
EXPOSE 6006 5000
# loading a large model takes minutes, during which nothing answers
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m CMD ["python3", "/app/serve/health.py"]
# The CUDA image's own entry point prints a banner to stdout, which belongs to results.
ENTRYPOINT []
# chat_main.sh ends in exec: the launcher becomes process 1 and passes SIGTERM on to the training processes.
CMD ["bash", "chat_main.sh"]
