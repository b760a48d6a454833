# Calotype's server on a processor. docs/edge.md says how it was built and tried; Docker itself has not built it so far.
#   docker build -t calotype .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges -p 127.0.0.1:8000:8000 \
#     -v ./keys:/run/secrets/keys:ro calotype        # a line NAME:KEY for each client
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY requirements/serve.txt requirements/
RUN python3 -m venv /opt/calotype \
    && /opt/calotype/bin/pip install --no-cache-dir --require-hashes --no-deps -r requirements/serve.txt
COPY . .
# setuptools builds Calotype, and is not needed afterwards, nor is pip.
RUN /opt/calotype/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /opt/calotype/bin/pip uninstall -y setuptools pip

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin calotype
COPY --from=build /opt/calotype /opt/calotype
# Plans and engines are mounted read-only, or left out: nothing is written but to /tmp.
ENV PATH=/opt/calotype/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp CALOTYPE_CACHE=/var/cache/calotype
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["calotype"]
CMD ["serve", "talbot", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/keys"]
