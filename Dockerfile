# The gateway's image.
#
#   docker build -t pd-proxy .
#   docker run -p 8000:8000 pd-proxy --prefill http://p1:8000 --decode http://d1:8000
#   docker run -v ./pd-proxy.yaml:/etc/pd-proxy.yaml:ro -p 8000:8000 pd-proxy --config /etc/pd-proxy.yaml
#
# The file overrides the image's defaults: if it sets host, that must be 0.0.0.0.
#
# The other commands need --entrypoint:
#
#   docker run --entrypoint pd-proxy -v ./pd-proxy.yaml:/etc/pd-proxy.yaml:ro pd-proxy check /etc/pd-proxy.yaml
#   docker run --entrypoint pd-proxy -p 9000:9000 pd-proxy simulate --role decode --host 0.0.0.0 --port 9000
#
# docker stop waits 10 s by default, and the gateway waits up to shutdown.grace (120 s) for running requests. So stop it with
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
# Only wheels, so no stage needs a compiler. All dependencies have wheels for x86-64 and for arm64.
RUN python -m venv --without-pip /opt/pd-proxy \
 && pip --python /opt/pd-proxy/bin/python install --only-binary :all: -c constraints.txt \
      "$(echo /wheels/pd_proxy-*.whl)[zmq]" /wheels/pd_proxy_simulator-*.whl

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="pd-proxy" \
      org.opencontainers.image.description="A prefill-decode disaggregation gateway for LLM serving" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/pd-proxy /opt/pd-proxy
# PD_PROXY_DEFAULTS is the address to listen on, unless a file, a variable or a flag sets another.
ENV PATH=/opt/pd-proxy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PD_PROXY_DEFAULTS=host=0.0.0.0,port=8000
# A number, so that Kubernetes' runAsNonRoot can check that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# The check finds the gateway's address by itself.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
  CMD ["python", "-m", "pd_proxy.commands.container_health"]
ENTRYPOINT ["pd-proxy", "serve"]
CMD []
