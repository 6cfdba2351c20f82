# fedsam's image, for the head, the sites and MLflow; infra/image/entrypoint.sh says how it becomes which.
#
#   docker build -t fedsam:0.1.0-cuda --build-arg VARIANT=cuda .
#   docker build -t fedsam:0.1.0-cpu --build-arg VARIANT=cpu --build-arg TORCH_INDEX=URL .
#
# All is installed here, in the versions of constraints.txt; nothing is fetched when it runs. PyTorch's usual wheel brings
# CUDA's libraries and runs on CPUs too; an index of its CPU wheels as TORCH_INDEX makes the cpu image 5 GB smaller.
ARG PYTHON=3.11.13
ARG VARIANT=cuda

FROM python:${PYTHON}-slim-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG VARIANT
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
RUN python -m venv /opt/fedsam
WORKDIR /src
# The packages first: a change of the code leaves this layer as it is.
COPY constraints.txt infra/image/requirements.py pyproject.toml ./
RUN python requirements.py pyproject.toml tracking > requirements.txt; \
    if [ "$VARIANT" = cpu ] && [ -n "$TORCH_INDEX" ]; then \
      /opt/fedsam/bin/pip install --index-url "$TORCH_INDEX" -c constraints.txt torch torchvision; \
    fi; \
    /opt/fedsam/bin/pip install -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY fedsam_core fedsam_core
COPY cluster cluster
COPY pipelines pipelines
RUN /opt/fedsam/bin/pip install --no-deps -c constraints.txt . && /opt/fedsam/bin/pip check

FROM python:${PYTHON}-slim-bookworm AS cpu
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin fedsam
COPY --from=build /opt/fedsam /opt/fedsam
COPY --chmod=0555 infra/image/entrypoint.sh /usr/local/bin/fedsam-node
ENV PATH=/opt/fedsam/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_JOB_STOP_WAIT_TIME_S=20 \
    MLFLOW_DISABLE_TELEMETRY=true
USER 10001:10001
WORKDIR /home/fedsam
ENTRYPOINT ["fedsam-node"]
CMD ["fedsam", "--help"]

FROM cpu AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM ${VARIANT}
