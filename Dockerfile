# The server in a container: `docker build -t zsmerge-llm .` for a CPU, and for NVIDIA's GPUs
# `docker build -t zsmerge-llm:cuda --build-arg DEVICE=cuda .` (run with `--gpus all`). docs/serving.md says more.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

ARG DEVICE=cpu
ARG TORCH=2.13.0
ARG CUDA=cu130

# g++ compiles the kernels, when a model is loaded for the first time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 zsmerge \
    && mkdir -p /data/sessions /data/cache \
    && chown -R zsmerge:zsmerge /data

WORKDIR /app
RUN if [ "$DEVICE" = cuda ]; then index="$CUDA"; else index=cpu; fi \
    && pip install --no-cache-dir "torch==$TORCH" --index-url "https://download.pytorch.org/whl/$index"
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY zsmerge_llm ./zsmerge_llm
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[server]" && rm -rf /app/*

USER 1000
# /data/cache has models and compiled kernels, /data/sessions conversations and responses.
ENV ZSMERGE_CACHE_DIR=/data/cache \
    PYTHONUNBUFFERED=1
VOLUME ["/data"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# Other machines reach a container, so it needs API keys: -e ZSMERGE_API_KEYS=..., or `--insecure` as an argument.
ENTRYPOINT ["zsmerge-llm", "serve", "--host", "0.0.0.0", "--port", "8000", "--sessions-dir", "/data/sessions"]
