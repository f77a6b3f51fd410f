# syntax=docker/dockerfile:1
# Two stages: what builds wheels stays behind; what runs is not root and holds no secret.
FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/rolecall
COPY requirements.lock pyproject.toml README.md ./
RUN /opt/rolecall/bin/pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock
COPY api api
COPY schemas schemas
RUN /opt/rolecall/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/rolecall rolecall
COPY --from=build /opt/rolecall /opt/rolecall
COPY hypercorn.toml /etc/rolecall/hypercorn.toml
ENV PATH=/opt/rolecall/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ROLECALL_BIND=0.0.0.0:8000 \
    ROLECALL_WORKERS=2 \
    ROLECALL_DATA_DIR=/var/lib/rolecall/data
WORKDIR /etc/rolecall
USER rolecall
VOLUME /var/lib/rolecall
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
CMD ["rolecall", "serve"]
