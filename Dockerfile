# Darkroom's images for production; docs/deploy.md says what runs where. Targets:
#
#   api         the HTTP server, with a health check
#   service     what needs no model: worker --cpu, migrate, keys; the API without a health check
#   worker-cpu  worker --model on the CPU
#   worker-cuda worker --model on one CUDA device; the host brings the driver
#
# Only the two workers hold torch. Which build of it is yours to say, as with make:
#
#   docker build --target worker-cpu --build-arg TORCH_ARGS="--index-url ADDRESS" .

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/darkroom/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
# tini is process 1: Python in its place would ignore a SIGTERM that comes while it is loading.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home darkroom \
    && install -d -o darkroom -g darkroom /var/lib/darkroom

FROM base AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS build-service
COPY constraints.txt /build/
RUN python -m venv /opt/darkroom
COPY --from=wheel /wheels /wheels
RUN pip install -c /build/constraints.txt "$(ls /wheels/darkroom-*.whl)[service]"

FROM base AS build-worker
COPY constraints.txt /build/
RUN python -m venv /opt/darkroom
# First and alone, in a layer of its own: gigabytes that no change of Darkroom's files loads again.
ARG TORCH_ARGS=""
RUN pip install -c /build/constraints.txt ${TORCH_ARGS} torch
COPY --from=wheel /wheels /wheels
RUN pip install -c /build/constraints.txt "$(ls /wheels/darkroom-*.whl)[engine,fetch,service,video]"

# What every image ends with: nobody's rights, and a stop that lets work drain.
FROM base AS runtime
ENV DARKROOM_HOME=/var/lib/darkroom \
    HF_HOME=/models \
    HF_HUB_OFFLINE=1
WORKDIR /var/lib/darkroom
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "darkroom"]

FROM runtime AS worker-cuda
USER root
# Triton compiles what launches its kernels, on the machine that runs them.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-worker /opt/darkroom /opt/darkroom
ENV DARKROOM_DEVICE=cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
HEALTHCHECK NONE
CMD ["worker"]

FROM runtime AS worker-cpu
COPY --from=build-worker /opt/darkroom /opt/darkroom
ENV DARKROOM_DEVICE=cpu \
    DARKROOM_MODEL=darkroom-tiny
HEALTHCHECK NONE
CMD ["worker"]

FROM runtime AS service
COPY --from=build-service /opt/darkroom /opt/darkroom
HEALTHCHECK NONE
CMD ["--help"]

FROM service AS api
EXPOSE 8000
# Liveness: whether this process answers. A restart would cure no database, so none is asked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["api", "--host", "0.0.0.0", "--port", "8000"]
