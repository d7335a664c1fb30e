# docker build -t darkroom .                                        (GPU)
# docker build -t darkroom --build-arg BASE=debian:trixie-slim .    (CPU)
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/darkroom
ENV PATH=/opt/darkroom/bin:$PATH

COPY pyproject.toml README.md LICENSE /src/
COPY darkroom /src/darkroom
RUN pip install --no-cache-dir /src && rm -rf /src

# uid 1000, as most hosts' first user: a mounted cache can be written. Ubuntu's image has that user already.
RUN (userdel --remove ubuntu 2>/dev/null || true) && useradd --uid 1000 --create-home darkroom
USER darkroom
WORKDIR /home/darkroom
RUN mkdir -p .cache/huggingface .local/share/darkroom
VOLUME /home/darkroom/.cache/huggingface /home/darkroom/.local/share/darkroom

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
  CMD python3 -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"

ENTRYPOINT ["darkroom", "serve", "--host", "0.0.0.0"]
CMD ["demo"]
