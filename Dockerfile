# The images of coserve: target `operator` (also the metrics API; no torch) and target `agent` (also the feeder).
# BASE is a Debian with Python 3.11 to 3.13, its venv module and openssl. How to reach PyPI may be given as build secrets:
# `pip.conf`, and `ca.crt` with the certificates that it names as /run/secrets/ca.crt.
ARG BASE=python:3.12-slim

FROM ${BASE} AS base
USER 0
RUN grep -q :65532: /etc/passwd || { echo 'coserve:x:65532:65532::/tmp:/usr/sbin/nologin' >>/etc/passwd; echo 'coserve:x:65532:' >>/etc/group; }
ENV PATH=/opt/coserve/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# Our packages as they are laid into the images: a layer of their own over the dependencies
FROM base AS project
COPY hack/build-requirements.txt /src/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    python3 -m venv /opt/coserve && pip install --no-cache-dir --require-hashes -r /src/build-requirements.txt
COPY pyproject.toml README.md LICENSE /src/
COPY cli/coserve_cli /src/cli/coserve_cli
COPY crds/coserve_api /src/crds/coserve_api
COPY crds/coserve_contract /src/crds/coserve_contract
COPY engine/coserve_engine /src/engine/coserve_engine
COPY node_agent/coserve_agent /src/node_agent/coserve_agent
COPY operator/coserve_operator /src/operator/coserve_operator
RUN pip install --no-index --no-deps --no-build-isolation --root /out /src

FROM base AS operator
RUN command -v openssl # the operator makes the metrics API's certificate with it
COPY requirements/operator.txt /tmp/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    python3 -m venv --without-pip /opt/coserve && python3 -m venv /tmp/pip \
    && /tmp/pip/bin/pip --python /opt/coserve/bin/python install --no-cache-dir --require-hashes -r /tmp/operator.txt \
    && rm -r /tmp/pip /tmp/operator.txt
COPY --from=project /out /
USER 65532:65532
CMD ["python", "-m", "coserve_operator.main"]

FROM base AS agent
# Triton compiles its launchers at run time, against Python's headers and the driver's library. The driver is mounted
# then: where the loader looks (NVIDIA's toolkit), or to /usr/local/nvidia (GKE). What is compiled is kept in
# TRITON_CACHE_DIR, for containers of the same pod unless it is a volume's, and read from COSERVE_IMAGE_KERNELS, where
# an image that is made from this one may bring it (coserve_engine.precompile).
ENV TRITON_CACHE_DIR=/tmp/triton COSERVE_IMAGE_KERNELS=/opt/coserve/kernels NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 LIBRARY_PATH=/usr/local/nvidia/lib64
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev $([ ! -x /usr/bin/python3 ] || echo python3-dev) \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/agent.txt /tmp/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    python3 -m venv --without-pip /opt/coserve && python3 -m venv /tmp/pip \
    && /tmp/pip/bin/pip --python /opt/coserve/bin/python install --no-cache-dir --require-hashes -r /tmp/agent.txt \
    && rm -r /tmp/pip /tmp/agent.txt
COPY --from=project /out /
USER 65532:65532
CMD ["python", "-m", "coserve_agent.main"]
