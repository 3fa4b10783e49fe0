# A CUDA development image: DeepSpeed compiles operators at the first use (CPUAdam for offload), for which it asks for the
# CUDA version that torch was built with. The pip wheels of torch 2.13 are built with CUDA 13.0 and bring their own cuDNN.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-devel-ubuntu24.04
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="llmops-deepspeed-backend" \
    org.opencontainers.image.description="Fine-tune chat models with DeepSpeed, LoRA or full" \
    org.opencontainers.image.version="0.1.0" \
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
# An empty PIP_INDEX_URL means pip's default; --build-arg PIP_INDEX_URL=... takes a mirror.
ARG PIP_INDEX_URL=""
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.txt /tmp/requirements.txt
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --disable-pip-version-check --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Caches in a folder that any user may write to, because --user can be anyone; LOGNAME for users without an account.
ENV HOME=/var/cache/llmops \
    LOGNAME=llmops \
    LANG=C.UTF-8 \
    HF_HOME=/var/cache/llmops/huggingface \
    MPLCONFIGDIR=/var/cache/llmops/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/llmops/torchinductor \
    TORCH_EXTENSIONS_DIR=/var/cache/llmops/torch_extensions \
    TRITON_CACHE_DIR=/var/cache/llmops/triton \
    XDG_CACHE_HOME=/var/cache/llmops \
    PYTHONUNBUFFERED=1 \
    MOUNT_PATH=/app/mnt
RUN install --directory --mode=1777 /var/cache/llmops \
    && install --directory --owner=1000 --group=1000 /app/mnt

WORKDIR /app
COPY . .

USER 1000:1000
# 6006: TensorBoard while training runs; 5000: kept for a model server
EXPOSE 6006 5000
# The CUDA image's own entry point prints a banner to stdout, which belongs to results.
ENTRYPOINT []
# chat_main.sh ends in exec: the launcher becomes process 1 and passes SIGTERM on to the training processes.
CMD ["bash", "chat_main.sh"]
