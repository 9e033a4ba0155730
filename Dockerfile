# Two targets: `docker build --target cpu .` and `docker build --target cuda .`
# How to run it, and what to keep: docs/how-to/container.md
#
# PYTHON_IMAGE  any image of Debian or Ubuntu with python 3.11 to 3.13 and pip, where Docker Hub is out of reach
# TORCH_FROM    where torch's CPU build comes from, if not the PyTorch index: "--find-links FOLDER_OR_URL"
# COMMIT        what `cocktail-serve --version` and /metrics name as the build: $(git rev-parse --short=12 HEAD)
ARG PYTHON_IMAGE=python:3.12-slim

FROM scratch AS code
COPY pyproject.toml hatch_build.py README.md LICENSE /
COPY cocktail_serve /cocktail_serve
COPY plugins /plugins
COPY configs /configs
COPY examples /examples

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libnuma1 && rm -rf /var/lib/apt/lists/* \
    && pip install uv && useradd --create-home cocktail
WORKDIR /app
EXPOSE 8000

FROM base AS cpu
ARG TORCH_FROM="--torch-backend cpu"
COPY requirements/cpu.txt requirements/cpu.txt
RUN uv pip install --system --no-cache ${TORCH_FROM} --no-deps -r requirements/cpu.txt
COPY --from=code / ./
ARG COMMIT=""
RUN echo "$COMMIT" > cocktail_serve/COMMIT && uv pip install --system --no-cache --no-deps .
USER cocktail
ENTRYPOINT ["cocktail-serve"]
CMD ["serve", "/config/cocktail.yaml", "--host", "0.0.0.0"]

FROM base AS cuda
COPY --from=code / ./
ARG COMMIT=""
RUN echo "$COMMIT" > cocktail_serve/COMMIT && uv pip install --system --no-cache ".[vllm,encoders]"
USER cocktail
ENTRYPOINT ["cocktail-serve"]
CMD ["serve", "/config/cocktail.yaml", "--host", "0.0.0.0"]
