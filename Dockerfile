# The gateway's image.
#
#   docker build -t pd-proxy .
#   docker run -p 8000:8000 pd-proxy --prefill http://p1:8000 --decode http://d1:8000
#   docker run -v ./pd-proxy.yaml:/etc/pd-proxy.yaml:ro -p 8000:8000 pd-proxy --config /etc/pd-proxy.yaml
#
# The file wins over what the image says, so host: 0.0.0.0 must stand there where host does.
#
# Its other commands, by naming the entry point:
#
#   docker run --entrypoint pd-proxy -v ./pd-proxy.yaml:/etc/pd-proxy.yaml:ro pd-proxy check /etc/pd-proxy.yaml
#   docker run --entrypoint pd-proxy -p 9000:9000 pd-proxy simulate --role decode --host 0.0.0.0 --port 9000
#
# docker stop waits 10 s by default and the gateway up to shutdown.grace (120 s) for running requests, so stop it with
# `docker stop -t 130`, or start it with `--stop-timeout 130`.

# The version that the tests run on.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY config config
COPY proxy proxy
# --no-build-isolation: with the setuptools that constraints.txt names, not with the newest.
RUN pip install -c constraints.txt setuptools \
 && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . ./proxy/pd_proxy_simulator
# Only wheels, hence no compiler in any stage. There are wheels of everything for x86-64 and for arm64.
RUN python -m venv --without-pip /opt/pd-proxy \
 && pip --python /opt/pd-proxy/bin/python install --only-binary :all: -c constraints.txt \
      "$(echo /wheels/pd_proxy-*.whl)[zmq]" /wheels/pd_proxy_simulator-*.whl

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="pd-proxy" \
      org.opencontainers.image.description="A prefill-decode disaggregation gateway for LLM serving" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/pd-proxy /opt/pd-proxy
# Where it listens unless a file, a variable or a flag says otherwise.
ENV PATH=/opt/pd-proxy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PD_PROXY_DEFAULTS=host=0.0.0.0,port=8000
# A number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# It finds out itself where the gateway listens.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
  CMD ["python", "-m", "pd_proxy.commands.container_health"]
ENTRYPOINT ["pd-proxy", "serve"]
CMD []
