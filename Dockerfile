# Two targets: `docker build --target cpu .` and `docker build --target cuda .`
# Mount a volume at /home/cocktail/.local/share/cocktail-serve, or set store.url: the registry would go with the container.
# PYTHON_IMAGE: any image of Debian or Ubuntu with python3.11 to 3.13 and pip, where Docker Hub is out of reach.
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libnuma1 && rm -rf /var/lib/apt/lists/* \
    && pip install uv && useradd --create-home cocktail
WORKDIR /app
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY requirements requirements
COPY cocktail_serve cocktail_serve
COPY plugins plugins
COPY configs configs
COPY examples examples
EXPOSE 8000

FROM base AS cpu
# Where torch's CPU build comes from: the PyTorch index, or (UV_TORCH_BACKEND=auto) pip's own and UV_FIND_LINKS.
ARG UV_TORCH_BACKEND=cpu UV_FIND_LINKS
RUN uv pip install --system --no-deps -r requirements/cpu.txt && uv pip install --system --no-deps .
USER cocktail
ENTRYPOINT ["cocktail-serve"]
CMD ["serve", "/config/cocktail.yaml", "--host", "0.0.0.0"]

FROM base AS cuda
RUN uv pip install --system ".[vllm,encoders]"
USER cocktail
ENTRYPOINT ["cocktail-serve"]
CMD ["serve", "/config/cocktail.yaml", "--host", "0.0.0.0"]
